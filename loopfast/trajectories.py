"""What a rollout leaves behind: latents stored once, their log-probabilities, and the pairs to train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loopfast.seeds import generator


@dataclass(frozen=True)
class Trajectories:
    """N trajectories of T transitions; a prompt's K samples lie side by side, so ``N = G · K``.

    Attributes:
        latents: ``[T + 1, N, *L]`` in the dtype the model saw, ``latents[0]`` being the initial noise.
            ``latents[t]`` is the sample and ``latents[t + 1]`` the previous sample of transition t.
        logprob: float32 ``[T, N]``, of each stored transition under the policy that sampled it.
    """

    latents: Tensor
    logprob: Tensor

    @property
    def steps(self) -> int:
        """T."""
        return self.logprob.shape[0]

    @property
    def count(self) -> int:
        """N."""
        return self.logprob.shape[1]

    @property
    def final(self) -> Tensor:
        """The denoised latents, ``[N, *L]``."""
        return self.latents[-1]

    def pairs(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(sample, prev_sample, logprob)`` of M (row, step) pairs, given by indices ``[M]`` each."""
        return self.latents[steps, rows], self.latents[steps + 1, rows], self.logprob[steps, rows]


def shuffled_pairs(
    count: int, steps: tuple[int, ...], updates: int, seed: int, iteration: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All (row, step) pairs of an iteration, shuffled together and dealt out to its updates.

    Args:
        count: N, the number of trajectories.
        steps: the transitions that are trained on.
        updates: how many parts to cut the pairs into; their sizes differ by one at most.
        seed, iteration, epoch: of the run; they determine the order.

    Yields:
        ``(rows [M], steps [M])`` int64 on the CPU, once per update.
    """
    order = torch.randperm(count * len(steps), generator=generator(seed, "pairs", iteration, epoch))
    transitions = torch.tensor(steps, dtype=torch.int64)
    for part in order.tensor_split(updates):
        yield part % count, transitions[part // count]
