"""The prompts of an iteration."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from loopfast.policies import Conditioning
from loopfast.profiling import range_
from loopfast.prompts import Prompt
from loopfast.seeds import derive, row_seeds
from loopfast.training.run import Run


@dataclass(frozen=True)
class Batch:
    """G prompts with the seeds of K samples each: ``N = G · K`` rows.

    Attributes:
        prompts: the G prompts.
        conditioning: the encoded prompts, rows ``[G, ...]``.
        prompt_index: int64 ``[N]`` on the CPU, each row's prompt. The K rows of a prompt are adjacent.
        seeds: int64 ``[N]`` on the CPU, each row's noise seed.
    """

    prompts: list[Prompt]
    conditioning: Conditioning
    prompt_index: Tensor
    seeds: Tensor

    @property
    def texts(self) -> list[str]:
        """The texts of the G prompts."""
        return [prompt.text for prompt in self.prompts]


def draw_prompts(run: Run, iteration: int) -> list[Prompt]:
    """Draws the G prompts of an iteration from the run's seed. A prompt repeats only after all were drawn."""
    wanted, available = run.config.rollout.prompts_per_iteration, len(run.prompts)
    rng = random.Random(derive(run.config.run.seed, "prompts", iteration))
    rounds = [rng.sample(run.prompts, min(available, wanted - done)) for done in range(0, wanted, available)]
    return [prompt for part in rounds for prompt in part]


def draw_batch(run: Run, iteration: int) -> Batch:
    """Draws and encodes the prompts of an iteration, with the seeds of their samples."""
    prompts, samples = draw_prompts(run, iteration), run.config.algorithm.samples_per_prompt
    with run.meter.phase("rollout"), range_("encode", "rollout"):
        conditioning = run.sampler.policy.encode([prompt.text for prompt in prompts])
    return Batch(
        prompts,
        conditioning,
        torch.arange(len(prompts)).repeat_interleave(samples),
        row_seeds(run.config.run.seed, "rollout", iteration, list(range(len(prompts))), samples),
    )
