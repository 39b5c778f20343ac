"""Scores a rollout's images: as they come, beside the sampling, or all at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor

from loopfast.profiling import phase
from loopfast.prompts import Prompt
from loopfast.rewards import RewardThread, Scores, join_scores

Worker = Literal["none", "inline", "thread", "process"]
"""Values of ``rollout.reward_worker``, with ``auto`` resolved."""
Score = Callable[[Tensor, Sequence[Prompt]], Scores]
"""Returns the scores of images ``[N, 3, H, W]`` of N prompts."""
Decode = Callable[[Tensor], Tensor]
"""Decodes latents to images."""
Timed = Callable[[], AbstractContextManager[None]]
"""Context of the time that rewards take while nothing is sampled."""


class Scorer(Protocol):
    """An object that scores images part by part."""

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> None:
        """Takes the denoised latents ``[n, *L]`` of a microbatch, and their n prompts."""

    def result(self) -> Scores:
        """Returns the scores of all submitted images, in their order."""


class Inline:
    """A scorer of each microbatch's images before the next is sampled."""

    def __init__(self, score: Score, decode: Decode, timed: Timed) -> None:
        self._score, self._decode, self._timed = score, decode, timed
        self._scores: list[Scores] = []

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> None:  # noqa: D102
        with self._timed():
            self._scores.append(self._score(self._decode(latents), prompts))

    def result(self) -> Scores:  # noqa: D102
        return join_scores(self._scores)


class Threaded:
    """A scorer of images in a thread, while others are sampled."""

    def __init__(self, thread: RewardThread[Prompt], decode: Decode, timed: Timed) -> None:
        self._thread, self._decode, self._timed = thread, decode, timed

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> None:  # noqa: D102
        with phase("reward"):
            self._thread.add(self._decode(latents), prompts)

    def result(self) -> Scores:  # noqa: D102
        with self._timed():
            return self._thread.result()


class AtTheEnd:
    """A scorer of all images in one call, for a reward that compares them."""

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
