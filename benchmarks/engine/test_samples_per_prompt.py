"""Peak memory of a run with many images for each prompt, compared with a run with few.

Only the trajectory of an image must be kept; everything else is computed one micro-batch at a time. So 64 images a
prompt need no more memory than 8, trajectories aside.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.timing import Playback
from loopfast.config import config_to_yaml, parse_config
from loopfast.run.tracking import read_metrics

RUN = """\
run: {name: run, trackers: []}
model: {pretrained: embedded, device: cpu, tune: full}
reward: [{name: embedded}]
rollout: {prompts_per_iteration: 4, steps: 10, microbatch: 16}
train: {iterations: 3, updates_per_iteration: 4, microbatch: 16, warmup_updates: 0}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 4, preview_images: 1}
checkpoint: {every: 3}
"""

# A run's peak without the memory of its libraries, and the trajectories' part of it.
WORKER = """\
import json, sys
import loopfast.training.collect as collecting
import loopfast.training.train as training
from loopfast.system.allocator import reuse_freed_memory
from loopfast.config import load_config
from loopfast.run.console import Display

kept = 0
gathered = collecting.gathered
def counted(*arguments):
    global kept
    found = gathered(*arguments)
    kept = max(kept, found[0].latents.nbytes + found[0].logprob.nbytes)
    return found
collecting.gathered = counted
reuse_freed_memory()
folder = training.train(load_config(sys.argv[1]), display=Display(quiet=True))
print(json.dumps({"folder": str(folder), "trajectories": kept}))
"""


def measure(samples: int, folder: Path) -> dict[str, Any]:
    """Measures a run with K images a prompt: ``peak`` and ``trajectories`` in bytes, ``seconds`` of each iteration."""
    config = parse_config(RUN, [f"run.directory={folder}", f"algorithm.samples_per_prompt={samples}"])
    file = folder / "config.yaml"
    file.write_text(config_to_yaml(config), "utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", WORKER, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    lines = read_metrics(Path(found["folder"]) / "metrics.jsonl")
    return {
        "peak": lines[-1]["peak_memory_bytes"],
        "trajectories": found["trajectories"],
        "seconds": [line["seconds_iteration"] for line in lines[1:]],
    }


def test_samples_per_prompt(
    playback: Playback, benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if benchmark.disabled:
        pytest.skip("takes a minute, and measures what a run on an idle machine takes")
    found = {}
    for samples in (8, 64):
        (tmp_path / str(samples)).mkdir()
        found[samples] = measure(samples, tmp_path / str(samples))
    few, many = (found[samples]["peak"] - found[samples]["trajectories"] for samples in (8, 64))
    playback.load(found[64]["seconds"])
    benchmark.group, benchmark.name = "engine_samples_per_prompt embedded", "K=64"
    benchmark.pedantic(lambda: None, rounds=len(found[64]["seconds"]))
    benchmark.extra_info |= request.getfixturevalue("machine") | {
        "op": "engine_samples_per_prompt",
        "setting": "embedded-K-64",
        "competitor": "ours",
        "backend": None,
        "peak_bytes": found[64]["peak"],
        **{f"{name}_{k}": found[k][name] for k in found for name in ("peak", "trajectories")},
        "beyond_trajectories": many / few,
    }
    # a hundredth more, because allocators handle blocks of other sizes differently
    assert many <= 1.01 * few
