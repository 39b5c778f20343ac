"""A run's rewards at work: how its images are scored, and what happens where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NoReturn

from torch import Tensor

from loopfast.config import Config
from loopfast.distributed.group import Group
from loopfast.errors import LoopfastError, RewardError
from loopfast.profiling import phase
from loopfast.prompts import Prompt
from loopfast.rewards import (
    RewardMemoryError,
    RewardProcess,
    RewardThread,
    Scores,
    build_rewards,
    join_scores,
    training_total,
)
from loopfast.rewards.base import quoted
from loopfast.rollout.trajectories import Trajectories
from loopfast.run.folder import RunFolder
from loopfast.training.guard import Guard

Worker = Literal["none", "inline", "thread", "process"]
Sample = Callable[[Callable[[slice, Tensor], None]], Trajectories]
"""Samples trajectories, and calls what it is given with the rows and the denoised latents of each microbatch."""


class Judge:
    """The rewards of a run.

    Args:
        config: the run.
        group: its processes.
        folder: where images that cannot be scored are kept.
        warn: called with a line where a run goes on without some of them.

    Attributes:
        iteration: whose images are scored, for messages and files.
    """

    def __init__(self, config: Config, group: Group, folder: RunFolder, warn: Callable[[str], None]) -> None:
        self._config, self._group, self._folder, self._warn = config, group, folder, warn
        worker = config.rollout.reward_worker
        self._rewards = (
            RewardProcess(config.reward, tf32=config.model.tf32)
            if worker == "process"
            else build_rewards(config.reward, whole=worker == "none")
        )
        self._guard = Guard(
            self._rewards,
            [term.title for term in config.reward],
            keep_bad=config.rollout.on_bad_reward == "drop_group",
            group=group,
        )
        self._thread = RewardThread(self.score)
        self.iteration = 0

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores images ``[N, 3, H, W]`` of N prompts; inside `together` only."""
        return self._guard.score(images, prompts)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what scores images: a reward that fails in one process ends the run in all, at the same point.

        Raises:
            RewardError: on leaving, in every process.
            RewardMemoryError: on leaving, in every process.
        """
        self._guard.clear()
        try:
            yield
        except (RewardError, RewardMemoryError):
            if self._guard.failure is None:
                raise
        failure = self._guard.failure
        told = "" if failure is None else str(failure)
        if isinstance(failure, RewardError):
            told += f"; {self._kept_images('failures')}"
        first = next(filter(None, self._group.texts(told)), None)
        if first is not None:
            # the error is of one kind in all processes, as what is done after it is done together
            memory = self._group.any(isinstance(failure, RewardMemoryError))
            self._end(first, failure, RewardMemoryError if memory else RewardError)

    def sample(
        self,
        worker: Worker,
        sample: Sample,
        decode: Callable[[Tensor], Tensor],
        prompts: Sequence[Prompt],
        timed: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Trajectories, Scores]:
        """Trajectories and the scores of their images.

        Args:
            worker: scores all images at the end (``none``), each microbatch's before the next is sampled (``inline``),
                or beside the sampling.
            sample: gives the trajectories.
            decode: images of latents.
            prompts: of the trajectories.
            timed: around what passes for the rewards' sake while nothing is sampled.
        """
        if worker == "none":
            trajectories = sample(lambda rows, latents: None)
            with timed():
                return trajectories, self.score(decode(trajectories.final), prompts)
        if worker == "inline":
            scores: list[Scores] = []

            def score(rows: slice, latents: Tensor) -> None:
                with timed():
                    scores.append(self.score(decode(latents), prompts[rows]))

            return sample(score), join_scores(scores)

        def hand_over(rows: slice, latents: Tensor) -> None:
            with phase("reward"):
                self._thread.add(decode(latents), prompts[rows])

        with self._thread.batch():
            trajectories = sample(hand_over)
            with timed():
                return trajectories, self._thread.result()

    def rewards(self, scores: Scores, texts: Sequence[str], steps: int) -> Tensor:
        """What an iteration is trained on, float32 ``[G, K]``; NaN for prompts that are left out, which is said.

        Args:
            scores: of all processes' images, the K of a prompt side by side.
            texts: the G prompts.
            steps: of a trajectory that each pass trains on.

        Raises:
            RewardError: fewer (image, step) pairs are left than there are updates.
        """
        samples = self._config.algorithm.samples_per_prompt
        rewards = training_total(self._config.reward, scores, samples)
        left = rewards.isfinite().all(1)
        if left.all():
            return rewards
        dropped = (~left).nonzero()[:, 0].tolist()
        told = (
            f"{len(dropped)} of {len(texts)} prompt(s) are left out, {quoted(texts, dropped)}: "
            f"{self._problems('bad-rewards')}"
        )
        pairs, updates = int(left.sum()) * samples * steps, self._config.train.updates_per_iteration
        if pairs < updates:
            self._end(f"{told}; {pairs} (image, step) pairs are left for {updates} update(s)")
        self._warn(f"iteration {self.iteration}: {told}")
        return rewards

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
            f"{self._problems('bad-rewards/evaluation')}"
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

    def _problems(self, place: str) -> str:
        """What was wrong with all processes' scores; keeps the images."""
        told = [*self._guard.problems.values()]
        if told:
            told.append(self._kept_images(place))
        return "; ".join(text for text in self._group.texts("; ".join(told)) if text)

    def _kept_images(self, place: str) -> str:
        rank = None if self._group.alone else self._group.rank
        return self.keep(self._guard.images, self._guard.texts, rank, place)

    def _end(
        self,
        reason: str,
        cause: LoopfastError | None = None,
        kind: type[RewardError | RewardMemoryError] = RewardError,
    ) -> NoReturn:
        """Ends the run in all processes, which know the reason."""
        error = kind(f"iteration {self.iteration}: {reason}")
        error.shared = not self._group.alone
        raise error from cause
