from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loopfast.config import Config, config_to_yaml, parse_config
from loopfast.tracking import read_metrics
from tests.distributed.ranks import Ranks

# 9 images of 3 prompts: neither 2 nor 4 processes have equally many, and a prompt's images lie with several of them.
RUN = """\
run: {name: run, trackers: []}
model: {pretrained: embedded, device: cpu, lora: {rank: 4}}
prompts: {source: "embedded:color"}
reward: [{name: embedded}, {name: jpeg_compressibility, weight: 0}]
algorithm: {samples_per_prompt: 3, logprob: mean}
rollout: {prompts_per_iteration: 3, steps: 2, microbatch: 2}
train: {iterations: 2, updates_per_iteration: 2, steps: all, learning_rate: 3e-5, warmup_updates: 0, microbatch: 8}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 3, preview_images: 1}
checkpoint: {every: 1, keep: 9}
"""

# Every update's statistics, beside the run's own record, which has means.
RECORD = """\
import json, loopfast.train
original = loopfast.train.update
def recorded(*arguments, **options):
    done = original(*arguments, **options)
    if rank == 0:
        with open({file!r}, "a") as file:
            print(json.dumps(vars(done)), file=file)
    return done
loopfast.train.update = recorded
"""


class Runs:
    """Runs of one small configuration by groups of processes."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks

    def config(self, name: str, *overrides: str) -> Config:
        given = (f"run.directory={self.folder}", f"run.name={name}", *overrides)
        return parse_config(RUN, given)

    def arguments(self, name: str, *overrides: str, resume: str | None = None) -> list[str]:
        file = self.folder / f"{name}.yaml"
        file.write_text(config_to_yaml(self.config(name, *overrides)), "utf-8")
        return ["train", "--config", str(file), *(["--resume", resume] if resume else [])]

    def train(
        self, name: str, size: int, *overrides: str, resume: str | None = None, before: str = ""
    ) -> Path:
        """The folder of a run by so many processes."""
        record = RECORD.format(file=str(self.folder / f"{name}.updates"))
        self.ranks.run(self.arguments(name, *overrides, resume=resume), size, before=record + before)
        return self.folder / name

    def updates(self, name: str) -> list[dict[str, Any]]:
        """The statistics of every update of a run."""
        lines = (self.folder / f"{name}.updates").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    forge = Ranks(tmp_path_factory.mktemp("ranks"))
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), ranks)


def saved(folder: Path, group: str = "policy", name: str | None = None) -> dict[str, Tensor]:
    """A group of tensors of a run's newest checkpoint, or of the one of that name."""
    checkpoints = folder / "checkpoints"
    newest = checkpoints / name if name else sorted(checkpoints.iterdir())[-1]
    return load_file(newest / f"{group}.safetensors")


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all tensors together, relative to the norm of what is expected."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    difference = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return float((difference / torch.stack([b.square().sum() for _, b in pairs]).sum()).sqrt())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's record without what depends on the machine and on how its work is cut."""
    measured = ("seconds", "images_per_second", "model_calls", "outside_model_share", "peak_memory_bytes")
    return [
        {key: value for key, value in line.items() if not key.startswith(measured)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
