"""Where a run stands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loopfast.algorithms import PromptStatistics
from loopfast.profiling import Times
from loopfast.rollout.trajectories import Trajectories


@dataclass(frozen=True)
class Rollout:
    """What an iteration has sampled, and what came of it.

    Attributes:
        trajectories: N of them; each process has the latents of its own rows.
        rewards: float32 ``[G, K]`` of all of them; NaN for all images of a prompt that is left out.
    """

    trajectories: Trajectories
    rewards: Tensor

    @property
    def kept(self) -> Tensor:
        """Bool ``[G]``: the prompts that are trained on."""
        return self.rewards.isfinite().all(1)


@dataclass
class TrainState:
    """Where a run stands between two updates; with weights and optimizer, all that a checkpoint holds.

    Attributes:
        iteration: complete iterations.
        images: sampled for training so far.
        seconds: spent so far when the state was last saved, earlier sessions included.
        pending: metrics of the latest iteration (0: before training) as long as it is not evaluated and recorded.
        metrics: of the iteration under way.
        updates: statistics of the updates done in it.
        zero_gradient: share of pairs without a gradient in the latest update that was not an iteration's first.
        rollout: what was sampled for the iteration under way.
        statistics: the history of each prompt's rewards.
        stopped: whether a callback has asked for an end; not saved, like all that follows.
        latest: what the latest iteration sampled, until its callbacks were called; None where there are none.
        times: the accounts of the latest stretch.
        began: the clock's reading when the run, had it not been interrupted, would have begun.
        saved: the newest checkpoint, and the position it is of.
        warned_of_rounding, warned_of_overflow: whether these warnings, given once, were.
    """

    iteration: int = 0
    images: int = 0
    seconds: float = 0.0
    pending: dict[str, Any] | None = field(default_factory=lambda: {"iteration": 0, "images": 0})
    metrics: dict[str, Any] = field(default_factory=dict)
    updates: list[dict[str, float]] = field(default_factory=list)
    zero_gradient: float = 0.0
    rollout: Rollout | None = None
    statistics: PromptStatistics = field(default_factory=PromptStatistics)
    stopped: bool = False
    latest: Rollout | None = None
    times: Times = field(default_factory=lambda: Times(0.0))
    began: float = field(default_factory=time.perf_counter)
    saved: tuple[tuple[int, ...], Path] | None = None
    warned_of_rounding: bool = False
    warned_of_overflow: bool = False

    @property
    def number(self) -> int:
        """The iteration that is sampled or learned from, or the last one, whose evaluation is due."""
        return self.iteration + (self.pending is None)

    @property
    def elapsed(self) -> float:
        """Seconds spent so far, earlier sessions included."""
        return time.perf_counter() - self.began

    @property
    def position(self) -> tuple[int, ...]:
        """What tells two states of a run apart."""
        return self.iteration, len(self.updates), self.pending is None, self.rollout is not None

    def add(self, amounts: Mapping[str, float]) -> None:
        """Adds to the metrics of the iteration under way."""
        for name, amount in amounts.items():
            self.metrics[name] = self.metrics.get(name, 0) + amount

    def account(self, times: Times) -> None:
        """Adds the accounts of a stretch to the metrics of the iteration under way."""
        self.times = times
        self.add(
            {f"seconds_{name}": seconds for name, seconds in times.phases.items()}
            | {"seconds_iteration": times.total, "seconds_model": times.model}
            | {"model_calls": times.calls.get("denoiser", 0)}
        )

    def discard_rollout(self) -> None:
        """Gives up what was sampled and not yet learned from."""
        if self.rollout is not None:
            self.images -= self.rollout.trajectories.count
            self.rollout = None

    def complete(self, metrics: Mapping[str, Any], statistics: PromptStatistics) -> None:
        """Ends the iteration under way, whose metrics are then to be evaluated and recorded."""
        self.iteration += 1
        self.statistics = statistics
        self.pending = {"iteration": self.iteration, "images": self.images, **metrics}
        self.metrics, self.updates, self.rollout = {}, [], None
