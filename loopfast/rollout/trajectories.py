"""The result of a rollout: latents, each stored once, and their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectories:
    """N trajectories of T transitions; a prompt's K samples lie side by side, so ``N = G · K``.

    With several processes, each holds the latents of n of the rows and the log-probabilities of all N.

    Attributes:
        latents: ``[T + 1, n, *L]`` in the dtype the model saw, ``latents[0]`` being the initial noise.
            ``latents[t]`` is the sample and ``latents[t + 1]`` the previous sample of transition t. On the policy's
            device, or in the host's memory.
        logprob: float32 ``[T, N]``, of each stored transition under the policy that sampled it; on the policy's
            device.
        first_row: the first row of ``latents``, which holds the rows ``first_row`` to ``first_row + n``.
    """

    latents: Tensor
    logprob: Tensor
    first_row: int = 0

    @property
    def steps(self) -> int:
        """The number of transitions, T."""
        return self.logprob.shape[0]

    @property
    def count(self) -> int:
        """The number of trajectories of all processes, N."""
        return self.logprob.shape[1]

    @property
    def final(self) -> Tensor:
        """The denoised latents of this process's rows, ``[n, *L]``."""
        return self.latents[-1]

    @property
    def rows(self) -> Tensor:
        """The rows whose latents this process holds: int64 ``[n]`` on the CPU."""
        return torch.arange(self.first_row, self.first_row + self.latents.shape[1])

    def to_host(self) -> Trajectories:
        """Returns a copy with the latents in the host's memory, page-locked if they come from a GPU."""
        if self.latents.device.type == "cpu":
            return self
        host = torch.empty_like(self.latents, device="cpu", pin_memory=self.latents.is_cuda)
        return replace(self, latents=host.copy_(self.latents))

    def pairs(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``(sample, prev_sample, logprob)`` of M (row, step) pairs, on the policy's device.

        Args:
            rows, steps: int64 ``[M]`` each, on any device; rows of this process. If they and the latents are in the
                host's memory, the copy of the latents to a GPU waits for nothing.
        """
        device = self.logprob.device
        logprob = self.logprob[steps.to(device), rows.to(device)]
        return self._latents(rows, steps), self._latents(rows, steps + 1), logprob

    def _latents(self, rows: Tensor, steps: Tensor) -> Tensor:
        home, device = self.latents.device, self.logprob.device
        rows, steps = rows.to(home) - self.first_row, steps.to(home)
        if home == device:
            return self.latents[steps, rows]
        part = torch.empty(
            len(rows), *self.latents.shape[2:], dtype=self.latents.dtype, pin_memory=device.type == "cuda"
        )
        torch.index_select(self.latents.flatten(0, 1), 0, steps * self.latents.shape[1] + rows, out=part)
        return part.to(device, non_blocking=True)
