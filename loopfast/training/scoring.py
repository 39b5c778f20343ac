"""Scores a run's images by its rewards, and handles images that cannot be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from loopfast.config import RewardConfig, RolloutConfig
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
from loopfast.training.scorer import AtTheEnd, Inline, Scorer, Threaded, Worker


class Scoring:
    """The rewards of a run.

    A reward that fails in one process must not end it at once, while others wait for its model calls. From then on
    nothing is scored, and scores are NaN, until the processes exchange their errors where `errors_on_all_ranks` ends.

    Args:
        terms: the section ``reward``.
        rollout: the section ``rollout``.
        world: processes of the run.
        folder: the run's folder, which keeps images that cannot be scored.
        warn: called with a line when a run continues without some images.
        tf32: whether rewards in a process of their own may compute in TF32.
        functions: functions of a Python program by the names that the configuration has for them.

    Raises:
        ConfigError: a reward cannot be used.

    Attributes:
        iteration: the iteration whose images are scored, for messages and files.
    """

    def __init__(
        self,
        terms: Sequence[RewardConfig],
        rollout: RolloutConfig,
        world: World,
        folder: RunFolder,
        warn: Callable[[str], None],
        *,
        tf32: bool = False,
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self._terms, self._rollout = terms, rollout
        self._world, self._folder, self._warn = world, folder, warn
        worker = rollout.reward_worker
        self._rewards = (
            RewardProcess(terms, tf32=tf32)
            if worker == "process"
            else build_rewards(terms, full_batch=worker == "none", functions=functions)
        )
        self._thread = RewardThread(self.score)
        self.iteration = 0
        self._clear()

    def _clear(self) -> None:
        """Forgets earlier problems."""
        self._failure: RewardError | RewardMemoryError | None = None
        # by reward, the first problem of its scores that is no failure
        self._problems: dict[str, str] = {}
        # images of failure and problems, float [3, H, W] on the CPU each, and their prompts
        self._images: list[Tensor] = []
        self._texts: list[str] = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores images ``[N, 3, H, W]`` of N prompts, in the context `errors_on_all_ranks`.

        Raises:
            RewardError, RewardMemoryError: a reward failed or ran out of memory, and the run has one process.
        """
        if self._failure is not None:
            return self._unscored(len(prompts))
        try:
            texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
            keep_bad = self._rollout.on_bad_reward == "drop_group"
            with model_call("reward", "reward"):
                scores = self._rewards.score(images, texts, metadata, keep_bad=keep_bad)
        except (RewardError, RewardMemoryError) as error:
            self._failure = error
            if isinstance(error, RewardError):
                self._remember(images, prompts, error.images_index)
            if self._world.size == 1:
                raise
            return self._unscored(len(prompts))
        if scores.problems:
            self._problems = {**scores.problems, **self._problems}
            self._remember(images, prompts, (~scores.total.isfinite()).nonzero()[:, 0].tolist())
        return scores

    def _remember(self, images: Tensor, prompts: Sequence[Prompt], positions: Sequence[int]) -> None:
        self._images += [images[position].float().cpu() for position in positions]
        self._texts += [prompts[position].text for position in positions]

    def _unscored(self, count: int) -> Scores:
        missing = torch.full((count,), torch.nan)
        return Scores(missing, dict.fromkeys((term.title for term in self._terms), missing))

    @contextmanager
    def errors_on_all_ranks(self) -> Iterator[None]:
        """Context in which images are scored; at its end, a reward that failed in one process ends the run in all.

        Raises:
            RewardError, RewardMemoryError: at the end, in every process.
        """
        self._clear()
        try:
            yield
        except (RewardError, RewardMemoryError):
            if self._failure is None:
                raise
        failure = self._failure
        message = "" if failure is None else str(failure)
        if isinstance(failure, RewardError):
            message += f"; {self._saved_images('failures')}"
        if first := next(filter(None, self._world.gather_texts(message)), ""):
            # All ranks raise an error of the same class, as they handle it together.
            memory = self._world.any(isinstance(failure, RewardMemoryError))
            self._end(first, failure, RewardMemoryError if memory else RewardError)

    @contextmanager
    def scorer(
        self,
        worker: Worker,
        decode: Callable[[Tensor], Tensor],
        timed: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[Scorer]:
        """Context of a rollout's scorer, within `errors_on_all_ranks`; after it, nothing is being scored.

        Args:
            worker: scores all images at the end (``none``), each microbatch's before the next is sampled (``inline``),
                or beside the sampling.
            decode, timed: see `loopfast.training.scorer`.
        """
        if worker == "none":
            yield AtTheEnd(self.score, decode, timed)
        elif worker == "inline":
            yield Inline(self.score, decode, timed)
        else:
            with self._thread.batch():
                yield Threaded(self._thread, decode, timed)

    def rewards(
        self, scores: Scores, texts: Sequence[str], steps: int, updates: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the rewards to train on, and which prompts are kept, see `training_rewards`; warns of the others.

        Args:
            scores: scores of all processes' images, the K of a prompt side by side.
            texts: the G prompts.
            steps: number of steps of a trajectory that each pass trains on.
            updates: number of updates in a pass.

        Raises:
            RewardError: fewer (image, step) pairs are left than there are updates.
        """
        samples = len(scores.total) // len(texts)
        rewards, kept = training_rewards(self._terms, scores, samples)
        if kept.all():
            return rewards, kept
        dropped = (~kept).nonzero()[:, 0].tolist()
        message = (
            f"{len(dropped)} of {len(texts)} prompt(s) are left out, {quoted(texts, dropped)}: "
            f"{self._all_problems('bad-rewards')}"
        )
        pairs = int(kept.sum()) * samples * steps
        if pairs < updates:
            self._end(f"{message}; {pairs} (image, step) pairs are left for {updates} update(s)")
        self._warn(f"iteration {self.iteration}: {message}")
        return rewards, kept

    def report_dropped(self, dropped: int, kept: int) -> None:
        """Warns of images that an evaluation drops, if there are any.

        Args:
            dropped, kept: numbers of images that are dropped and kept.

        Raises:
            RewardError: no image is kept.
        """
        if not dropped:
            return
        message = (
            f"{dropped} of {dropped + kept} image(s) are left out of the evaluation: "
            f"{self._all_problems('bad-rewards/evaluation')}"
        )
        if not kept:
            self._end(message)
        self._warn(f"iteration {self.iteration}: {message}")

    def save_images(
        self,
        images: Sequence[Tensor],
        texts: Sequence[str],
        rank: int | None = None,
        place: str = "failures",
    ) -> str:
        """Saves bad images and their prompts; returns a message with their folder."""
        try:
            folder = self._folder.save_failure(self.iteration, images, texts, rank, place=place)
        except LoopfastError as error:
            return f"the images could not be kept: {error}"
        return f"images and prompts are in {folder}"

    def close(self) -> None:
        """Ends the rewards' thread, and their process if they have one."""
        self._thread.close()
        if isinstance(self._rewards, RewardProcess):
            self._rewards.close()

    def _all_problems(self, place: str) -> str:
        """Returns the problems of all processes' scores, and saves their images."""
        messages = [*self._problems.values(), *([self._saved_images(place)] if self._problems else [])]
        return "; ".join(filter(None, self._world.gather_texts("; ".join(messages))))

    def _saved_images(self, place: str) -> str:
        rank = None if self._world.size == 1 else self._world.rank
        return self.save_images(self._images, self._texts, rank, place)

    def _end(
        self,
        reason: str,
        cause: LoopfastError | None = None,
        kind: type[RewardError | RewardMemoryError] = RewardError,
    ) -> NoReturn:
        """Ends the run in all processes, which all know the reason."""
        error = kind(f"iteration {self.iteration}: {reason}")
        error.on_all_ranks = self._world.size > 1
        raise error from cause
