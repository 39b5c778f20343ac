"""A small policy, its schedule and its sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.policies import Policy, load_policy, load_schedule
from loopfast.rollout import Sampler, StepCache
from loopfast.rollout.trajectories import Trajectories
from loopfast.schedules import TransitionSchedule

PROMPTS = ["a red circle and a blue square", "three green triangles"]
ROWS = torch.tensor([0, 0, 1, 1, 0])
SEEDS = torch.tensor([5, 6, 7, 8, 9])
STEPS = 4


def load(folder: Path, device: str = "cpu", **options: Any) -> Policy:
    return load_policy(ModelConfig(pretrained=str(folder), device=device, **options))


def schedule(folder: Path, **options: Any) -> TransitionSchedule:
    return load_schedule(ModelConfig(pretrained=str(folder)), RolloutConfig(steps=STEPS, **options))


def sampler(
    policy: Policy, folder: Path, guidance: float = 1.0, microbatch: int = 3, **options: Any
) -> Sampler:
    options.setdefault("steps", StepCache())
    return Sampler(policy, schedule(folder).to(policy.device), guidance, "sum", microbatch, **options)


def run(made: Sampler, **options: Any) -> Trajectories:
    found = made.allocate(len(SEEDS))
    for _ in made.stream(found, made.policy.encode(PROMPTS), ROWS, SEEDS, **options):
        pass
    return found


def same(first: Trajectories, second: Trajectories) -> bool:
    return torch.equal(first.latents, second.latents) and torch.equal(first.logprob, second.logprob)


def move(policy: Policy, scale: float = 0.05) -> dict[str, Tensor]:
    """Changes the trained weights, in place, and returns copies."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += scale * torch.randn_like(parameter)
    return {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
