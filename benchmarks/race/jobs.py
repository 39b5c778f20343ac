"""Gives work to the two trainers: a job as a JSON file, a process of the right environment, and a result as a JSON
file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .settings import Json, Work, merged

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "race"
EMBEDDED = ROOT / "loopfast" / "embedded" / "model"
WORKERS = Path(__file__).parent / "workers"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
LOOPFAST_PYTHON = ROOT / ".venv-race" / "bin" / "python"
"""Of an environment as a user has it: ``loopfast[train]``, without the tools of development."""


class RaceError(Exception):
    """A run of the race failed, or its results cannot be compared."""


def model_folder(work: Work) -> Path:
    """Returns the folder of the model that both trainers read."""
    return EMBEDDED if work.model == "embedded" else BUILD / "models" / work.model


def trl_job(
    work: Work,
    ddpo: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    iterations: int,
    repeat: int | None,
    seconds: float | None = None,
    export: Path | None = None,
    export_every: int = 1,
    keep_images: Path | None = None,
    ratios: bool = False,
) -> Json:
    """Returns the job for ``trl_worker.py``.

    Args:
        work: its model, tuning and reward are used.
        ddpo: arguments of ``DDPOConfig``.
        prompts: texts to draw from.
        iterations: the largest number of iterations.
        repeat: the number of consecutive uses of each prompt, in turn; None draws them at random.
        seconds: training stops after the iteration in which this time is over.
        export: folder for the UNet's weights, every `export_every` iterations and at the end; not timed.
        export_every: see `export`.
        keep_images: file for the first images scored, and their rewards.
        ratios: record the share of ratios outside the clip range.
    """
    return {
        "model": str(model_folder(work)),
        "lora": work.tune == "lora",
        "prompts": list(prompts),
        "repeat": repeat,
        "reward": work.reward,
        "ddpo": dict(ddpo),
        "iterations": iterations,
        "seconds": seconds,
        "export": str(export) if export else None,
        "export_every": export_every,
        "keep_images": str(keep_images) if keep_images else None,
        "ratios": ratios,
    }


def loopfast_job(
    config: Mapping[str, Any],
    folder: Path,
    *,
    iterations: int,
    seconds: float | None = None,
    checkpoints: int = 0,
) -> Json:
    """Returns the job for ``loopfast_worker.py``.

    Args:
        config: a configuration; run, iterations and checkpoints are added.
        folder: the run's new folder.
        iterations: the largest number of iterations.
        seconds: the run is stopped after this time.
        checkpoints: iterations between checkpoints, all of which are kept; 0 keeps only the last.
    """
    changes = {
        "run": {"name": folder.name, "directory": str(folder.parent)},
        "train": {"iterations": iterations},
        "checkpoint": {"every": checkpoints or iterations, "keep": 10_000, "keep_best": False},
    }
    return {"config": merged(config, changes), "seconds": seconds}


def score_job(images: Path, prompts: Sequence[str], reward: str) -> Json:
    """Returns the job for ``judge.py`` to score images that TRL's process scored."""
    return {"kind": "score", "images": str(images), "prompts": list(prompts), "reward": reward}


def evaluation_job(
    weights: Sequence[str],
    guidances: Sequence[float],
    prompts: str,
    *,
    images_per_prompt: int,
    steps: int = 10,
    seed: int = 0,
) -> Json:
    """Returns the job for ``judge.py`` to evaluate weights of the embedded model's UNet."""
    return {
        "kind": "evaluate",
        "weights": list(weights),
        "guidances": list(guidances),
        "prompts": prompts,
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "config": {
            "model": {"pretrained": str(EMBEDDED)},
            "reward": [{"name": "embedded"}, {"name": "embedded_exact", "weight": 0}],
            "rollout": {"steps": steps, "eta": 1.0},
        },
    }


def environment(threads: int) -> dict[str, str]:
    """Returns the environment of every worker: its number of threads, no network, nothing of this process's Python."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LOOPFAST_"))}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_worker(worker: str | Path, job: Json, folder: Path, threads: int, *, reuse: bool = False) -> Json:
    """Runs a worker to its end.

    Args:
        worker: its file, or the name of one in `WORKERS`.
        job: its job.
        folder: for its files: ``job.json``, ``result.json``, ``log.txt``.
        threads: the number of OpenMP's threads.
        reuse: use an existing result if it is from the same job with the same number of threads.

    Raises:
        RaceError: the worker failed; the message ends with its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {**job, "result": str(folder / "result.json"), "omp_threads": threads}
    file, result = folder / "job.json", folder / "result.json"
    if reuse and result.exists() and file.exists() and json.loads(file.read_text("utf-8")) == job:
        return json.loads(result.read_text("utf-8"))
    result.unlink(missing_ok=True)
    shutil.rmtree(folder / "run", ignore_errors=True)  # our own run, cut off or from another job
    file.write_text(json.dumps(job, indent=1), "utf-8")
    environments = {"trl_worker": TRL_PYTHON, "loopfast_worker": LOOPFAST_PYTHON}
    python = str(environments.get(str(worker), sys.executable))
    script = WORKERS / f"{worker}.py" if isinstance(worker, str) else worker
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [python, str(script), str(file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(threads),
            cwd=folder,
            check=False,
        )
    if done.returncode or not result.exists():
        tail = "\n".join((folder / "log.txt").read_text("utf-8").splitlines()[-12:])
        raise RaceError(f"{script.stem} ended with {done.returncode}; {folder / 'log.txt'} ends with\n{tail}")
    return json.loads(result.read_text("utf-8"))
