"""What a rollout leaves behind: latents stored once, and their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectories:
    """N trajectories of T transitions; a prompt's K samples lie side by side, so ``N = G · K``.

    Of those of a group of processes, each has the latents of some rows and the log-probabilities of all.

    Attributes:
        latents: ``[T + 1, n, *L]`` in the dtype the model saw, ``latents[0]`` being the initial noise.
            ``latents[t]`` is the sample and ``latents[t + 1]`` the previous sample of transition t. On the policy's
            device, or in the host's memory.
        logprob: float32 ``[T, N]``, of each stored transition under the policy that sampled it; on the policy's
            device.
        first: the row that ``latents`` begin with; they are the rows ``first`` to ``first + n``.
    """

    latents: Tensor
    logprob: Tensor
    first: int = 0

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
        """The denoised latents that are here, ``[n, *L]``."""
        return self.latents[-1]

    @property
    def rows(self) -> Tensor:
        """The rows whose latents are here: int64 ``[n]`` on the CPU."""
        return torch.arange(self.first, self.first + self.latents.shape[1])

    def to_host(self) -> Trajectories:
        """With the latents in the host's memory, page-locked where they come from a GPU."""
        if self.latents.device.type == "cpu":
            return self
        host = torch.empty_like(self.latents, device="cpu", pin_memory=self.latents.is_cuda)
        return Trajectories(host.copy_(self.latents), self.logprob, self.first)

    def pairs(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(sample, prev_sample, logprob)`` of M (row, step) pairs, on the policy's device.

        Args:
            rows, steps: int64 ``[M]`` each, on any device; rows whose latents are here. On the CPU, the copy of latents
                that are kept there to a GPU waits for nothing.
        """
        device = self.logprob.device
        logprob = self.logprob[steps.to(device), rows.to(device)]
        return self._latents(rows, steps), self._latents(rows, steps + 1), logprob

    def _latents(self, rows: Tensor, steps: Tensor) -> Tensor:
        home, device = self.latents.device, self.logprob.device
        rows, steps = rows.to(home) - self.first, steps.to(home)
        if home == device:
            return self.latents[steps, rows]
        part = torch.empty(
            len(rows), *self.latents.shape[2:], dtype=self.latents.dtype, pin_memory=device.type == "cuda"
        )
        torch.index_select(self.latents.flatten(0, 1), 0, steps * self.latents.shape[1] + rows, out=part)
        return part.to(device, non_blocking=True)
