"""Trains for some iterations and writes the figures of each one when it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from loopfast.config import Config
from loopfast.run.console import Display
from loopfast.training.train import train

from .measure import Work, memory

_KEYS = (
    "ratio_max_deviation",
    "on_policy_outside_clip",
    "images_per_second",
    "seconds_iteration",
    "seconds_rollout",
    "seconds_reward",
    "seconds_replay",
    "seconds_optimizer",
    "outside_model_share",
    "grad_norm",
)


class _Enough(Exception):  # noqa: N818 - a way out, not an error
    """The last measured iteration is over; neither a checkpoint nor an export is wanted."""


class _Watch(Display):
    """Writes a line for each iteration, and ends the run after the last."""

    def __init__(self, work: Work, iterations: int, pairs: int) -> None:
        super().__init__(quiet=True)
        self._work, self._iterations, self._pairs = work, iterations, pairs
        self._began = time.monotonic()

    def advance(self, metrics: Mapping[str, Any]) -> None:
        """Called before the checkpoint of an iteration; 0 is the evaluation before training."""
        iteration = metrics["iteration"]
        if iteration == 0:
            return
        figures = {key: metrics[key] for key in _KEYS if key in metrics}
        if replay := metrics.get("seconds_replay"):
            figures["pairs_per_second"] = self._pairs / replay
        if speed := metrics.get("images_per_second"):
            figures["images_per_gpu_hour"] = 3600 * speed
        wall = time.monotonic() - self._began
        self._work.record.write(
            self._work.name, iteration=iteration, **figures, **memory(self._work.device), wall_seconds=wall
        )
        if iteration == self._iterations:
            raise _Enough

    def warning(self, text: str) -> None:
        """Records warnings beside the figures: a step that could not be recorded, a micro-batch that was halved."""
        self._work.record.write(self._work.name, warning=text[:300])
        super().warning(text)


def run(work: Work, config: Config, pairs: int) -> None:
    """Trains with a configuration and writes a line for each iteration.

    Args:
        work: the name and the record of the lines.
        config: the run. It ends before its last iteration, so that nothing is saved.
        pairs: (image, step) pairs that an iteration trains on.
    """
    try:
        train(config, display=_Watch(work, config.train.iterations - 1, pairs))
    except _Enough:
        return
