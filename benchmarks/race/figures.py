"""From what the workers measured to the figures of the race."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

Json = dict[str, Any]
Curve = Sequence[tuple[float, float]]
"""Points (seconds of training, reward), in order."""

PHASES = ("sampling", "reward", "training")


def summarize(runs: Sequence[Mapping[str, Any]], images: int) -> Json:
    """The figures of one trainer's runs of the same work.

    The first iteration of each run warms up and is left out.

    Args:
        runs: of a worker; each with two iterations or more.
        images: in an iteration.

    Returns:
        ``seconds``, the median over runs of a run's median iteration; the same of each phase; ``images_per_s``; the
        highest ``peak_bytes``; and what the runs have in common.
    """
    measured = [run["iterations"][1:] for run in runs]

    def middle(key: str) -> float:
        return median(median(iteration[key] for iteration in run) for run in measured)

    seconds = middle("seconds")
    return {
        "seconds": seconds,
        "seconds_of_runs": [median(iteration["seconds"] for iteration in run) for run in measured],
        **{phase: middle(phase) for phase in PHASES},
        "images_per_s": images / seconds,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "imported_bytes": max(run["imported_bytes"] for run in runs),
        "optimizer_steps": runs[0]["optimizer_steps"],
        "trainable": runs[0]["trainable"],
    }


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean of several seeds' curves, point by point, as far as all of them go."""
    return [
        (fmean(point[0] for point in points), fmean(point[1] for point in points))
        for points in zip(*curves, strict=False)
    ]


def peak(curve: Curve) -> tuple[float, float]:
    """The point with the highest reward; the earliest of equals."""
    return max(curve, key=lambda point: (point[1], -point[0]))


def time_to(curve: Curve, target: float) -> float | None:
    """When a curve reaches a reward: at the first point there that is confirmed by the next, where there is one.

    Nothing is interpolated, so that the time is one at which weights exist that were measured.
    """
    for index, (seconds, reward) in enumerate(curve):
        if reward >= target and all(later[1] >= target for later in curve[index + 1 : index + 2]):
            return seconds
    return None


def time_to_reward(trl: Sequence[Curve], loopfast: Sequence[Curve]) -> Json:
    """The race to the reward that TRL reaches within its budget.

    Args:
        trl: a curve per seed, as far as its budget goes; evaluations take no time.
        loopfast: the same of ours.

    Returns:
        ``target``, the best of TRL's mean curve, ``trl_seconds`` at which it has it, ``loopfast_seconds`` at which our
        mean curve has it and ``speedup``, null where ours never has it, and each seed's time to the same target.
    """
    mean_trl, mean_ours = mean_curve(trl), mean_curve(loopfast)
    trl_seconds, target = peak(mean_trl)
    seconds = time_to(mean_ours, target)
    return {
        "target": target,
        "trl_seconds": trl_seconds,
        "trl_seeds": [peak(curve)[1] for curve in trl],
        "loopfast_seconds": seconds,
        "loopfast_seeds": [time_to(curve, target) for curve in loopfast],
        "speedup": None if seconds is None else trl_seconds / seconds,
        "mean_curves": {"trl": mean_trl, "loopfast": mean_ours},
    }
