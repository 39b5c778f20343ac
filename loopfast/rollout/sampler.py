"""The sampling loop over the transition table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loopfast.policies import Conditioning, Policy, expand, pad_rows
from loopfast.schedules import TransitionSchedule
from loopfast.seeds import derive
from loopfast.trajectories import Trajectories
from loopfast_kernels import denoise_step, philox_normal


def initial_latents(policy: Policy, seeds: Tensor) -> Tensor:
    """The noise that sampling starts from: ``[N, *L]`` in the policy's dtype, a function of the rows' seeds alone."""
    # a key of its own for each row, so that no transition's noise repeats it
    keys = torch.tensor([derive(seed, "initial") for seed in seeds.tolist()], dtype=torch.int64)
    noise = philox_normal(keys, torch.zeros_like(keys), (len(keys), *policy.latent_shape))
    return noise.to(policy.device, policy.dtype)


@dataclass(frozen=True)
class Sampler:
    """A policy, the transitions it is sampled by, and how.

    Attributes:
        policy: the model to sample from.
        schedule: its T transitions, on the policy's device.
        guidance_scale: of classifier-free guidance; 1 for none.
        reduction: ``sum`` or ``mean``, of the log-probability over a latent's elements.
        microbatch: rows per model call. It changes neither the noise nor, beyond rounding in the model, the result.
    """

    policy: Policy
    schedule: TransitionSchedule
    guidance_scale: float
    reduction: str
    microbatch: int

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        prompts: Tensor,
        seeds: Tensor,
        *,
        between: Callable[[], None] = lambda: None,
    ) -> Trajectories:
        """Samples N trajectories.

        Args:
            conditioning: of the P prompts, rows ``[P, ...]``.
            prompts: int64 ``[N]``, each row's prompt.
            seeds: int64 ``[N]``, each row's noise seed.
            between: called before each microbatch; it may raise to stop.

        Returns:
            The trajectories, on the policy's device.
        """
        policy, schedule = self.policy, self.schedule
        count, steps = len(seeds), len(schedule.timesteps)
        latents = torch.empty(
            steps + 1, count, *policy.latent_shape, dtype=policy.dtype, device=policy.device
        )
        logprob = torch.empty(steps, count, dtype=torch.float32, device=policy.device)
        latents[0] = initial_latents(policy, seeds)
        for rows in slices(count, self.microbatch):
            between()
            size = rows.stop - rows.start
            # every call has the same batch size; see `pad_rows`
            text = expand(conditioning, pad_rows(prompts[rows], self.microbatch).to(policy.device))
            seed = pad_rows(seeds[rows], self.microbatch).to(policy.device)
            sample = pad_rows(latents[0, rows], self.microbatch)
            for index in range(steps):
                step = torch.full((self.microbatch,), index, dtype=torch.int64, device=policy.device)
                output, unconditional = policy.predict(
                    sample, schedule.timesteps[step], text, self.guidance_scale
                )
                sample, scores = denoise_step(
                    output,
                    sample,
                    schedule.table,
                    step,
                    seed,
                    uncond_output=unconditional,
                    guidance_scale=self.guidance_scale,
                    reduction=self.reduction,
                )
                latents[index + 1, rows] = sample[:size]
                logprob[index, rows] = scores[:size]
        return Trajectories(latents, logprob)

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 ``[N, 3, H, W]`` in [0, 1] of latents ``[N, *L]``, decoded a microbatch at a time."""
        return torch.cat(
            [self.policy.decode(latents[rows]) for rows in slices(len(latents), self.microbatch)]
        )


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(count)``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def automatic_microbatch(rows: int, latent_shape: tuple[int, ...]) -> int:
    """Rows per model call where the configuration says ``auto``: 65,536 latent elements, 4 latents of 4×64×64."""
    return max(1, min(rows, 65_536 // math.prod(latent_shape)))
