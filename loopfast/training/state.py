"""The state of a run, which checkpoints hold."""

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
    """The trajectories of an iteration and their rewards.

    Attributes:
        trajectories: N trajectories; each rank holds the latents of its own rows.
        rewards: float32 ``[G, K]`` of all of them; NaN for all images of a prompt that is not kept.
        kept: bool ``[G]``, the prompts to train on.
    """

    trajectories: Trajectories
    rewards: Tensor
    kept: Tensor


@dataclass
class TrainState:
    """The state of a run between two updates. A checkpoint holds it, the weights and the optimizer's state.

    Attributes:
        iteration: the number of complete iterations.
        images: the number of images sampled for training so far.
        seconds: the run's duration when the state was last saved, earlier sessions included.
        pending: the latest iteration's metrics that await evaluation and recording. They belong to iteration 0 before
            training. None while an iteration is under way.
        metrics: the metrics of the iteration under way.
        updates: the statistics of its completed updates.
        zero_gradient: the share of pairs without a gradient in the latest update that was not an iteration's first.
        rollout: the rollout of the iteration under way.
        statistics: the history of each prompt's rewards.
        stopped: whether a callback has asked to stop. This and the following attributes are not saved.
        latest: the latest rollout until callbacks have been called; None without callbacks.
        times: the times that the meter has measured last.
        began: the clock's reading at the start of the run, moved later by the length of interruptions.
        saved: the newest checkpoint and the position that it holds.
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
        """The number, from 1, of the iteration under way, or of the latest one if it awaits its evaluation."""
        return self.iteration + (self.pending is None)

    @property
    def elapsed(self) -> float:
        """The run's duration in seconds, earlier sessions included."""
        return time.perf_counter() - self.began

    @property
    def position(self) -> tuple[int, ...]:
        """A key that differs between any two states of a run."""
        return self.iteration, len(self.updates), self.pending is None, self.rollout is not None

    def add(self, amounts: Mapping[str, float]) -> None:
        """Adds amounts to the metrics of the iteration under way."""
        for name, amount in amounts.items():
            self.metrics[name] = self.metrics.get(name, 0) + amount

    def account(self, times: Times) -> None:
        """Adds measured times to the metrics of the iteration under way."""
        self.times = times
        self.add(
            {f"seconds_{name}": seconds for name, seconds in times.phases.items()}
            | {"seconds_iteration": times.total, "seconds_model": times.model}
            | {"model_calls": times.calls.get("denoiser", 0)}
        )

    def discard_rollout(self) -> None:
        """Discards the rollout, on which no update has been made."""
        if self.rollout is not None:
            self.images -= self.rollout.trajectories.count
            self.rollout = None

    def complete(self, metrics: Mapping[str, Any], statistics: PromptStatistics) -> None:
        """Ends the iteration under way. Its metrics then await evaluation and recording."""
        self.iteration += 1
        self.statistics = statistics
        self.pending = {"iteration": self.iteration, "images": self.images, **metrics}
        self.metrics, self.updates, self.rollout = {}, [], None
