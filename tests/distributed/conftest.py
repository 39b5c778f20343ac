from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loopfast.config import Config, config_to_yaml, parse_config
from loopfast.run.tracking import read_metrics
from tests.distributed.ranks import Ranks, shared_ranks

# 9 images of 3 prompts: neither 2 nor 4 processes have equally many, and a prompt's images lie with several of them.
RUN = """\
run: {name: run, trackers: []}
model: {device: cpu, tune: full, lora: {rank: 4, alpha: 128}}
prompts: {source: "embedded:color"}
reward: [{name: "tests.distributed.brightness:reward", label: bright}, {name: jpeg_compressibility, weight: 0}]
algorithm: {samples_per_prompt: 3, logprob: mean}
rollout: {prompts_per_iteration: 3, steps: 2, microbatch: 3}
train: {iterations: 2, updates_per_iteration: 2, steps: all, learning_rate: 3e-5, warmup_updates: 0, microbatch: 8}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 3, preview_images: 1}
checkpoint: {every: 1, keep: 9}
"""

# Every update's statistics; the run's own metrics have only means.
RECORD = """\
import json, loopfast.training.train
original = loopfast.training.train.update
def recorded(*arguments, **options):
    done = original(*arguments, **options)
    if rank == 0:
        with open({file!r}, "a") as file:
            print(json.dumps(vars(done)), file=file)
    return done
loopfast.training.train.update = recorded
"""

# This takes a third of a short run's time.
NO_REPORT = "import loopfast.training.train; loopfast.training.train.write_report = lambda folder: folder\n"


class Runs:
    """Runs of one small configuration with several processes."""

    def __init__(self, folder: Path, ranks: Ranks, pipeline: Path) -> None:
        self.folder, self.ranks, self._pipeline = folder, ranks, pipeline
        self._done: dict[tuple[object, ...], str] = {}

    def config(self, name: str, *overrides: str) -> Config:
        given = (f"model.pretrained={self._pipeline}", f"run.directory={self.folder}", f"run.name={name}")
        return parse_config(RUN, (*given, *overrides))

    def arguments(self, name: str, *overrides: str, resume: str | None = None) -> list[str]:
        file = self.folder / f"{name}.yaml"
        file.write_text(config_to_yaml(self.config(name, *overrides)), "utf-8")
        return ["train", "--config", str(file), *(["--resume", resume] if resume else [])]

    def train(
        self, name: str, size: int, *overrides: str, resume: str | None = None, before: str = NO_REPORT
    ) -> Path:
        """Trains with this number of processes and returns the run's folder."""
        record = RECORD.format(file=str(self.folder / f"{name}.updates"))
        self.ranks.run(self.arguments(name, *overrides, resume=resume), size, before=record + before)
        return self.folder / name

    def shared(self, size: int, *overrides: str) -> str:
        """Returns the name of a run that is trained once for all tests that use it."""
        key = (size, *overrides)
        if key not in self._done:
            name = f"shared-{len(self._done)}"
            self.train(name, size, *overrides)
            # only the first process prints
            assert [self.ranks.errors(rank) for rank in range(size)] == [""] * size
            assert [self.ranks.shown(rank) for rank in range(1, size)] == [""] * (size - 1)
            assert self.ranks.shown(0).count("final reward") == 1
            stage = self.config(name, *overrides).distributed.zero_stage
            assert (f"processes     {size}, ZeRO stage {stage}" in self.ranks.shown(0)) == (size > 1)
            self._done[key] = name
        return self._done[key]

    def updates(self, name: str) -> list[dict[str, Any]]:
        """Returns the statistics of every update of a run."""
        lines = (self.folder / f"{name}.updates").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return shared_ranks()


@pytest.fixture(scope="session")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), ranks, pipeline_folder)


def saved(folder: Path, group: str = "policy", name: str | None = None) -> dict[str, Tensor]:
    """Returns named tensors of a run's newest checkpoint, or of the checkpoint with the given name."""
    checkpoints = folder / "checkpoints"
    newest = checkpoints / name if name else sorted(checkpoints.iterdir())[-1]
    return load_file(newest / f"{group}.safetensors")


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the distance of all tensors together, relative to the norm of the expected ones."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    difference = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return float((difference / torch.stack([b.square().sum() for _, b in pairs]).sum()).sqrt())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns a run's metrics without values that depend on the machine and on the distribution of the work."""
    measured = ("seconds", "images_per_second", "model_calls", "outside_model_share", "peak_memory_bytes")
    return [
        {key: value for key, value in line.items() if not key.startswith(measured)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
