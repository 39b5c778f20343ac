#!/usr/bin/env bash
# Records iterations of a configuration with Nsight Systems.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: profiles/nsys.sh [OPTION]... CONFIG [KEY=VALUE]...

Records iterations of a configuration with Nsight Systems, after one that warms up.

  CONFIG             a recipe's name, such as tiny, or a YAML file
  KEY=VALUE          overrides, such as rollout.guidance_scale=3

  -n, --iterations N  iterations to record (1)
  -o, --output DIR    folder of the report, nsys.nsys-rep (profile)
      --dry-run       print the command and do nothing
  -h, --help          this text

PYTHON picks the interpreter (.venv/bin/python). profiles/README.md says how to read the report.
TEXT
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

iterations=1
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit ;;
        --dry-run) dry_run=yes; shift ;;
        -n | --iterations) value "$@"; iterations=$2; shift 2 ;;
        -o | --output) value "$@"; output=$2; shift 2 ;;
        -*) fail "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
configuration "$@"
positive --iterations "$iterations" iterations

# graph nodes: without them a captured denoising step is one block on the timeline
profile nsys "Nsight Systems" profile \
    "--trace=cuda,nvtx,cudnn,cublas" \
    --sample=none \
    --cpuctxsw=none \
    --cuda-graph-trace=node \
    --capture-range=nvtx \
    --nvtx-capture=profile@loopfast \
    --capture-range-end=stop \
    --force-overwrite=true \
    "--output=$output/nsys" \
    "${PYTHON:-.venv/bin/python}" -m loopfast profile \
    "--iterations=$iterations" \
    --no-trace \
    "${trained[@]}"
