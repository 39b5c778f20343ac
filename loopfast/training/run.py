"""The parts of a run in progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from loopfast.algorithms import ALGORITHMS
from loopfast.config import Config
from loopfast.distributed.world import World
from loopfast.engines import Engine
from loopfast.errors import LoopfastError
from loopfast.profiling import Category, Meter
from loopfast.prompts import PromptList
from loopfast.rollout import Sampler, StochasticSteps
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.run.tracking import Tracker
from loopfast.system.interrupts import StopRequest
from loopfast.training.microbatch import Microbatches
from loopfast.training.scoring import Scoring, Worker


class Stopped(Exception):  # noqa: N818 - being stopped is not an error
    """Unwinds to where the state is saved, after a signal."""


@dataclass
class Run:
    """What a run is made of. `loopfast.training.setup.start` makes it, and ends it.

    Attributes:
        config: the run.
        display: where progress is shown; it is silent in all processes but the first.
        stop: notes signals.
        world: the processes of the run.
        folder: where its files go.
        prompts, evaluation_prompts: those that are trained on and those that evaluations draw.
        scoring: its rewards.
        reward_identity: what the rewards' names stand for, see `loopfast.training.identity`.
        steps: the denoising steps that draw noise, and those that are trained on.
        trained_per_trajectory: the number of steps of each trajectory that one pass trains on.
        microbatches: rows per model call.
        sampler: the policy, and how it is sampled; `resize` replaces it.
        engine: owns the policy's weights.
        meter: the accounts of an iteration.
        tracker: the record of metrics; None in all processes but the first.
        callbacks: called after every iteration, see `loopfast.training.callbacks`.
    """

    config: Config
    display: Display
    stop: StopRequest
    world: World
    folder: RunFolder
    prompts: PromptList
    evaluation_prompts: PromptList
    scoring: Scoring
    reward_identity: dict[str, str]
    steps: StochasticSteps
    trained_per_trajectory: int
    microbatches: Microbatches
    sampler: Sampler
    engine: Engine
    meter: Meter
    tracker: Tracker | None = None
    callbacks: Sequence[Callable[[Any], object]] = ()

    @property
    def screening(self) -> Literal["auto", "on", "off"]:
        """``train.screening``; off where nothing is clipped, or where a divergence gives every pair a gradient."""
        algorithm = self.config.algorithm
        possible = ALGORITHMS[algorithm.name].clip_range is not None and algorithm.kl_weight == 0
        return self.config.train.screening if possible else "off"

    @property
    def reward_worker(self) -> Worker:
        """``rollout.reward_worker``, decided where it is ``auto``."""
        worker = self.config.rollout.reward_worker
        if worker != "auto":
            return worker
        return "thread" if self.sampler.model.device.type == "cuda" else "inline"

    def resize(self, rows: int) -> Sampler:
        """The sampler, with ``rows`` per model call from now on."""
        if self.sampler.microbatch != rows:
            self.sampler.release()
            self.sampler = replace(self.sampler, microbatch=rows)
        return self.sampler

    @contextmanager
    def phase(self, name: Category) -> Iterator[None]:
        """Context of a part of the iteration: it is shown, here and to profilers, and entered in the accounts."""
        self.display.phase(name)
        with self.meter.phase(name):
            yield

    def check_stop(self) -> None:
        """Raises `Stopped` in every process, once a signal has come to one of them."""
        if self.world.any(self.stop.requested):
            raise Stopped

    def raised_on_all_ranks(self, error: LoopfastError) -> bool:
        """Whether an error is raised in all processes at once, so that they can still save together."""
        return error.on_all_ranks or self.world.size == 1

    def close_tracker(self) -> None:
        """Ends the record of metrics."""
        if self.tracker is not None:
            self.tracker.close()
