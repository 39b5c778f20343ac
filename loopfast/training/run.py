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
from loopfast.training.scorer import Worker
from loopfast.training.scoring import Scoring


class Stopped(Exception):  # noqa: N818 - being stopped is not an error
    """A signal has come. `loopfast.training.saving` catches this and saves the state."""


@dataclass
class Run:
    """The parts of a run. `loopfast.training.setup.start` makes and ends them.

    Attributes:
        config: the configuration.
        display: shows progress; silent on all ranks but 0.
        stop: records signals.
        world: the processes.
        folder: the run's files.
        prompts: the prompts to train on.
        evaluation_prompts: the prompts to evaluate on.
        scoring: the rewards.
        reward_identity: digests of the rewards' files, see `loopfast.training.identity`.
        steps: the denoising steps that draw noise, and the steps that are trained on.
        trained_per_trajectory: the number of steps of each trajectory that one pass trains on.
        microbatches: the rows per model call.
        sampler: samples the policy; `resize` replaces it.
        engine: owns the policy's weights.
        meter: measures the time of an iteration's phases.
        tracker: writes metrics; None on all ranks but 0.
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
        """``train.screening``; off if the algorithm has no clip, or if a KL penalty gives every pair a gradient."""
        algorithm = self.config.algorithm
        possible = ALGORITHMS[algorithm.name].clip_range is not None and algorithm.kl_weight == 0
        return self.config.train.screening if possible else "off"

    @property
    def drops_bad_rewards(self) -> bool:
        """True if prompts with a failed reward are dropped, as ``rollout.on_bad_reward: drop_group`` says."""
        return self.config.rollout.on_bad_reward == "drop_group"

    @property
    def reward_worker(self) -> Worker:
        """``rollout.reward_worker``, with ``auto`` resolved."""
        worker = self.config.rollout.reward_worker
        if worker != "auto":
            return worker
        return "thread" if self.sampler.model.device.type == "cuda" else "inline"

    def resize(self, rows: int) -> Sampler:
        """Returns the sampler, which samples ``rows`` per model call from now on."""
        if self.sampler.microbatch != rows:
            self.sampler.release()
            self.sampler = replace(self.sampler, microbatch=rows)
        return self.sampler

    @contextmanager
    def phase(self, name: Category) -> Iterator[None]:
        """Context of a phase of the iteration, which is displayed, measured and visible to profilers."""
        self.display.phase(name)
        with self.meter.phase(name):
            yield

    def check_stop(self) -> None:
        """Raises `Stopped` on every rank once any rank has received a signal."""
        if self.world.any(self.stop.requested):
            raise Stopped

    def raised_on_all_ranks(self, error: LoopfastError) -> bool:
        """Returns whether all ranks raise this error, so that they can still save a checkpoint together."""
        return error.on_all_ranks or self.world.size == 1

    def close_tracker(self) -> None:
        """Closes the tracker, if this rank has one."""
        if self.tracker is not None:
            self.tracker.close()
