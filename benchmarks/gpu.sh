#!/usr/bin/env bash
# Everything a GPU can say about the ops, in one command: its tests, the benchmarks, a roofline plot.
# Results go to profiles/results/<device>/. PYTHON picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

device=$("$python" - <<'PYTHON'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"bench-gpu needs an NVIDIA GPU, and torch {torch.__version__} sees none")

from benchmarks.keep import device_slug

print(device_slug(torch.cuda.get_device_name()))
PYTHON
)
folder=profiles/results/$device
mkdir -p "$folder"
raw=$(mktemp)
trap 'rm -f "$raw"' EXIT

{
    date --utc +%F
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv
    "$python" -m torch.utils.collect_env
} > "$folder/machine.txt"
"$python" -m pytest -m gpu | tee "$folder/tests.txt"
LOOPFAST_BENCH_DEVICE=cuda "$python" -m pytest benchmarks --benchmark-only --benchmark-json="$raw"
results=$("$python" -m benchmarks.keep "$raw" "$folder")
"$python" -m benchmarks.compare "$results" > "$folder/speedup.md"
"$python" profiles/roofline.py "$results" "$folder/roofline.png"
echo "written to $folder"
