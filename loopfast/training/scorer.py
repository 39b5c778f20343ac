"""How a rollout's images are scored: as they come, beside the sampling, or all at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from loopfast.profiling import phase
from loopfast.prompts import Prompt
from loopfast.rewards import RewardThread, Scores, join_scores

Score = Callable[[Tensor, Sequence[Prompt]], Scores]
"""The scores of images ``[N, 3, H, W]`` of N prompts."""
Decode = Callable[[Tensor], Tensor]
"""The images of latents."""
Timed = Callable[[], AbstractContextManager[None]]
"""Context around what passes for the rewards' sake while nothing is sampled."""


class Scorer(Protocol):
    """Scores what is handed over, part by part."""

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> None:
        """Takes the denoised latents ``[n, *L]`` of a microbatch, and their n prompts."""

    def result(self) -> Scores:
        """The scores of all that was submitted, in its order."""


class Inline:
    """Scores each microbatch's images before the next is sampled."""

    def __init__(self, score: Score, decode: Decode, timed: Timed) -> None:
        self._score, self._decode, self._timed = score, decode, timed
        self._scores: list[Scores] = []

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> None:  # noqa: D102
        with self._timed():
            self._scores.append(self._score(self._decode(latents), prompts))

    def result(self) -> Scores:  # noqa: D102
        return join_scores(self._scores)


class Beside:
    """Has a thread score the images while others are sampled."""

    def __init__(self, thread: RewardThread[Prompt], decode: Decode, timed: Timed) -> None:
        self._thread, self._decode, self._timed = thread, decode, timed

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> None:  # noqa: D102
        with phase("reward"):
            self._thread.add(self._decode(latents), prompts)

    def result(self) -> Scores:  # noqa: D102
        with self._timed():
            return self._thread.result()


class AtTheEnd:
    """Scores all images in one call, for a reward that compares them."""

    def __init__(self, score: Score, decode: Decode, timed: Timed) -> None:
        self._score, self._decode, self._timed = score, decode, timed
        self._latents: list[Tensor] = []
        self._prompts: list[Prompt] = []

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> None:  # noqa: D102
        self._latents.append(latents)
        self._prompts += prompts

    def result(self) -> Scores:  # noqa: D102
        with self._timed():
            return self._score(self._decode(torch.cat(self._latents)), self._prompts)
