"""A run's rewards at work: how its images are scored, and what happens where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from loopfast.config import Config
from loopfast.distributed.world import World
from loopfast.errors import LoopfastError, RewardError
from loopfast.profiling import model_call
from loopfast.prompts import Prompt
from loopfast.rewards import (
    RewardMemoryError,
    RewardProcess,
    RewardThread,
    Scores,
    build_rewards,
    training_rewards,
)
from loopfast.rewards.base import quoted
from loopfast.run.folder import RunFolder
from loopfast.training.scorer import AtTheEnd, Beside, Inline, Scorer

Worker = Literal["none", "inline", "thread", "process"]


class Scoring:
    """The rewards of a run.

    Where other processes wait for this one's model calls, a reward that fails must not end it at once: from then on
    nothing is scored, and what the rewards give is NaN, until the processes tell each other at the end of `together`.

    Args:
        config: the run.
        world: its processes.
        folder: where images that cannot be scored are kept.
        warn: called with a line where a run goes on without some of them.
        given: functions of a Python program by the names that the configuration has for them.

    Raises:
        ConfigError: a reward cannot be used.

    Attributes:
        iteration: whose images are scored, for messages and files.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        folder: RunFolder,
        warn: Callable[[str], None],
        given: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self._config, self._world, self._folder, self._warn = config, world, folder, warn
        worker = config.rollout.reward_worker
        self._rewards = (
            RewardProcess(config.reward, tf32=config.model.tf32)
            if worker == "process"
            else build_rewards(config.reward, whole=worker == "none", functions=given)
        )
        self._thread = RewardThread(self.score)
        self.iteration = 0
        self._clear()

    def _clear(self) -> None:
        """Forgets what was wrong."""
        self._failure: RewardError | RewardMemoryError | None = None
        # by reward, what was first wrong with its scores where that is no failure
        self._problems: dict[str, str] = {}
        # what failure and problems are about: float [3, H, W] on the CPU each, and their prompts
        self._images: list[Tensor] = []
        self._texts: list[str] = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores images ``[N, 3, H, W]`` of N prompts; inside `together` only.

        Raises:
            RewardError: a reward failed, and no other process waits.
            RewardMemoryError: a reward ran out of memory, and no other process waits.
        """
        if self._failure is not None:
            return self._unscored(len(prompts))
        try:
            with model_call("reward", "reward"):
                scores = self._rewards.score(
                    images,
                    [prompt.text for prompt in prompts],
                    [prompt.metadata for prompt in prompts],
                    keep_bad=self._config.rollout.on_bad_reward == "drop_group",
                )
        except (RewardError, RewardMemoryError) as error:
            self._failure = error
            if isinstance(error, RewardError):
                self._note(images, prompts, error.images_index)
            if self._world.size == 1:
                raise
            return self._unscored(len(prompts))
        if scores.problems:
            self._problems = {**scores.problems, **self._problems}
            self._note(images, prompts, (~scores.total.isfinite()).nonzero()[:, 0].tolist())
        return scores

    def _note(self, images: Tensor, prompts: Sequence[Prompt], positions: Sequence[int]) -> None:
        self._images += [images[position].float().cpu() for position in positions]
        self._texts += [prompts[position].text for position in positions]

    def _unscored(self, count: int) -> Scores:
        missing = torch.full((count,), torch.nan)
        return Scores(missing, dict.fromkeys((term.title for term in self._config.reward), missing))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context around what scores images: a reward that fails in one process ends the run in all, at one point.

        Raises:
            RewardError: on leaving, in every process.
            RewardMemoryError: on leaving, in every process.
        """
        self._clear()
        try:
            yield
        except (RewardError, RewardMemoryError):
            if self._failure is None:
                raise
        failure = self._failure
        told = "" if failure is None else str(failure)
        if isinstance(failure, RewardError):
            told += f"; {self._kept_images('failures')}"
        first = next(filter(None, self._world.gather_texts(told)), None)
        if first is not None:
            # the error is of one kind in all processes, as what is done after it is done together
            memory = self._world.any(isinstance(failure, RewardMemoryError))
            self._end(first, failure, RewardMemoryError if memory else RewardError)

    @contextmanager
    def scorer(
        self,
        worker: Worker,
        decode: Callable[[Tensor], Tensor],
        timed: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[Scorer]:
        """Context of a rollout's scorer, inside `together`; on leaving, nothing is being scored.

        Args:
            worker: scores all images at the end (``none``), each microbatch's before the next is sampled (``inline``),
                or beside the sampling.
            decode: images of latents.
            timed: context around what passes for the rewards' sake while nothing is sampled.
        """
        if worker == "none":
            yield AtTheEnd(self.score, decode, timed)
        elif worker == "inline":
            yield Inline(self.score, decode, timed)
        else:
            with self._thread.batch():
                yield Beside(self._thread, decode, timed)

    def rewards(self, scores: Scores, texts: Sequence[str], steps: int) -> tuple[Tensor, Tensor]:
        """Returns the rewards that an iteration is trained on, and which prompts are kept; see `training_rewards`.

        Warns of prompts that are not kept.

        Args:
            scores: scores of all processes' images, the K of a prompt side by side.
            texts: the G prompts.
            steps: number of steps of a trajectory that each pass trains on.

        Raises:
            RewardError: fewer (image, step) pairs are left than there are updates.
        """
        samples = self._config.algorithm.samples_per_prompt
        rewards, kept = training_rewards(self._config.reward, scores, samples)
        if kept.all():
            return rewards, kept
        dropped = (~kept).nonzero()[:, 0].tolist()
        told = (
            f"{len(dropped)} of {len(texts)} prompt(s) are left out, {quoted(texts, dropped)}: "
            f"{self._all_problems('bad-rewards')}"
        )
        pairs, updates = int(kept.sum()) * samples * steps, self._config.train.updates_per_iteration
        if pairs < updates:
            self._end(f"{told}; {pairs} (image, step) pairs are left for {updates} update(s)")
        self._warn(f"iteration {self.iteration}: {told}")
        return rewards, kept

    def account_for(self, dropped: int, kept: int) -> None:
        """Says that images are left out of an evaluation, if any are.

        Args:
            dropped, kept: how many are, and are not.

        Raises:
            RewardError: none is left.
        """
        if not dropped:
            return
        told = (
            f"{dropped} of {dropped + kept} image(s) are left out of the evaluation: "
            f"{self._all_problems('bad-rewards/evaluation')}"
        )
        if not kept:
            self._end(told)
        self._warn(f"iteration {self.iteration}: {told}")

    def keep(
        self,
        images: Sequence[Tensor],
        texts: Sequence[str],
        rank: int | None = None,
        place: str = "failures",
    ) -> str:
        """Keeps images and prompts that something is wrong with, and says where."""
        try:
            folder = self._folder.save_failure(self.iteration, images, texts, rank, place=place)
        except LoopfastError as unwritten:
            return f"the images could not be kept: {unwritten}"
        return f"images and prompts are in {folder}"

    def close(self) -> None:
        """Ends the rewards' thread and their process, where they have one."""
        self._thread.close()
        if isinstance(self._rewards, RewardProcess):
            self._rewards.close()

    def _all_problems(self, place: str) -> str:
        """What was wrong with all processes' scores; keeps the images."""
        told = [*self._problems.values(), *([self._kept_images(place)] if self._problems else [])]
        return "; ".join(text for text in self._world.gather_texts("; ".join(told)) if text)

    def _kept_images(self, place: str) -> str:
        rank = None if self._world.size == 1 else self._world.rank
        return self.keep(self._images, self._texts, rank, place)

    def _end(
        self,
        reason: str,
        cause: LoopfastError | None = None,
        kind: type[RewardError | RewardMemoryError] = RewardError,
    ) -> NoReturn:
        """Ends the run in all processes, which know the reason."""
        error = kind(f"iteration {self.iteration}: {reason}")
        error.on_all_ranks = self._world.size > 1
        raise error from cause
