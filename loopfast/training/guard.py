"""Scores a run's images, and remembers those that could not be scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopfast.distributed.group import ALONE, Group
from loopfast.errors import RewardError
from loopfast.profiling import model_call
from loopfast.prompts import Prompt
from loopfast.rewards.base import RewardSet, Scores
from loopfast.rewards.fitting import RewardMemoryError
from loopfast.rewards.process import RewardProcess

__all__ = ["Guard"]


class Guard:
    """What stands between a run and its rewards.

    Where other processes wait for this one's model calls, a reward that fails must not end it at once: from then on
    nothing is scored, and what the rewards give is NaN, until the processes tell each other.

    Args:
        rewards: the run's.
        titles: of its terms.
        keep_bad: a score that is not finite or not there is no failure, see `RewardSet.score`.
        group: the processes of the run.

    Attributes:
        failure: of a reward since the last `clear`.
        problems: by reward, what was first wrong with its scores since then, where that is no failure.
        images, texts: what failure and problems are about, float ``[3, H, W]`` on the CPU each, and their prompts.
    """

    def __init__(
        self,
        rewards: RewardSet | RewardProcess,
        titles: Sequence[str],
        *,
        keep_bad: bool = False,
        group: Group = ALONE,
    ) -> None:
        self._rewards, self._titles, self._keep_bad, self._group = rewards, titles, keep_bad, group
        self.clear()

    def clear(self) -> None:
        """Forgets what was wrong."""
        self.failure: RewardError | RewardMemoryError | None = None
        self.problems: dict[str, str] = {}
        self.images: list[Tensor] = []
        self.texts: list[str] = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores images ``[N, 3, H, W]`` of N prompts.

        Raises:
            RewardError: a reward failed, and no other process waits.
            RewardMemoryError: a reward ran out of memory, and no other process waits.
        """
        if self.failure is not None:
            return self._unscored(len(prompts))
        try:
            with model_call("reward", "reward"):
                scores = self._rewards.score(
                    images,
                    [prompt.text for prompt in prompts],
                    [prompt.metadata for prompt in prompts],
                    keep_bad=self._keep_bad,
                )
        except (RewardError, RewardMemoryError) as error:
            self.failure = error
            if isinstance(error, RewardError):
                self._keep(images, prompts, error.images_index)
            if self._group.alone:
                raise
            return self._unscored(len(prompts))
        if scores.problems:
            self.problems = {**scores.problems, **self.problems}
            self._keep(images, prompts, (~scores.total.isfinite()).nonzero()[:, 0].tolist())
        return scores

    def _keep(self, images: Tensor, prompts: Sequence[Prompt], positions: Sequence[int]) -> None:
        self.images += [images[position].float().cpu() for position in positions]
        self.texts += [prompts[position].text for position in positions]

    def _unscored(self, count: int) -> Scores:
        missing = torch.full((count,), torch.nan)
        return Scores(missing, dict.fromkeys(self._titles, missing))
