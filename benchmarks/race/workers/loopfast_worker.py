"""One run of ours: ``python loopfast_worker.py JOB``.

JOB is a JSON file that `benchmarks.race.jobs.loopfast_job` describes. The measurements are read from the run's own
record, ``metrics.jsonl``: an iteration is the time between two lines, less that of evaluations and
checkpoints.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loopfast.system.allocator import reuse_freed_memory

# as the command line does, before torch is imported
reuse_freed_memory()

# ruff: noqa: E402
import torch
from resident import resident_peak
from safetensors import safe_open

from loopfast.config import parse_config
from loopfast.errors import Interrupted
from loopfast.run.console import Display
from loopfast.run.tracking import read_metrics
from loopfast.training.train import train

IMPORTED = resident_peak()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the measurements."""
    config = parse_config(json.dumps(job["config"]))
    timer = None
    if job["seconds"] is not None:
        # as Ctrl-C would: the run saves its state and ends between two updates
        timer = threading.Timer(job["seconds"], os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
    try:
        train(config, display=Display(quiet=True))
    except Interrupted:
        pass
    finally:
        if timer is not None:
            timer.cancel()
    folder = Path(config.run.directory) / config.run.name
    records = list(read_metrics(folder / "metrics.jsonl"))
    if len(records) < 2:
        raise SystemExit(
            f"the run was stopped after {job['seconds']} s, before its first iteration was complete"
        )
    iterations: list[dict[str, Any]] = []
    until = [0.0]
    for before, record in itertools.pairwise(records):
        apart = sum(record.get(key, 0.0) for key in ("seconds_eval", "seconds_checkpoint"))
        seconds = record["seconds"] - before["seconds"] - apart
        iterations.append(
            {
                "seconds": seconds,
                "sampling": record["seconds_rollout"],
                "reward": record["seconds_reward"],
                "training": record["seconds_replay"] + record["seconds_optimizer"],
            }
        )
        until.append(until[-1] + seconds)
    # only complete iterations; after an interruption the last one may be incomplete
    checkpoints = sorted(path for path in (folder / "checkpoints").glob("iteration-??????") if path.is_dir())
    exports = []
    for path in checkpoints:
        number = int(path.name.removeprefix("iteration-"))
        if 0 < number < len(until):
            file = str(path / "policy.safetensors")
            exports.append({"iteration": number, "seconds": until[number], "file": file})
    with safe_open(checkpoints[-1] / "policy.safetensors", framework="pt") as weights:
        trainable = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    cuda = torch.cuda.is_available()
    return {
        "iterations": iterations,
        "optimizer_steps": config.train.updates_per_iteration * config.train.inner_epochs,
        "trainable": trainable,
        "outside": records[1]["ratio_outside_clip"],
        "deviation": records[1]["ratio_max_deviation"],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident_peak(),
        "imported_bytes": IMPORTED,
        "exports": exports,
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name)
            for name in ("loopfast", "torch", "diffusers", "transformers", "accelerate", "peft")
        },
    }


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(task["result"]).write_text(json.dumps(run(task)), "utf-8")
