"""Computes the figures of the race from the workers' measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

Json = dict[str, Any]
Curve = Sequence[tuple[float, float]]
"""Points (seconds of training, reward), in order."""

PHASES = ("sampling", "reward", "training")


def summarize(runs: Sequence[Mapping[str, Any]], images: int) -> Json:
    """Returns the figures of one trainer's runs of the same work.

    The first iteration of each run warms up and is not counted.

    Args:
        runs: results of a worker; each with two iterations or more.
        images: the number of images in an iteration.

    Returns:
        ``seconds``, the median over runs of a run's median iteration; the same for each phase; ``images_per_s``; the
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
    """Returns the mean of several seeds' curves, point by point, up to the end of the shortest one."""
    return [
        (fmean(point[0] for point in points), fmean(point[1] for point in points))
        for points in zip(*curves, strict=False)
    ]


def peak(curve: Curve) -> tuple[float, float]:
    """Returns the point with the highest reward; the earliest of equal ones."""
    return max(curve, key=lambda point: (point[1], -point[0]))


def time_to(curve: Curve, target: float) -> float | None:
    """Returns when a curve reaches a reward: its first point with this reward that the next point confirms, if there is
    one.

    Nothing is interpolated, so that weights of this moment exist and were measured.
    """
    for index, (seconds, reward) in enumerate(curve):
        if reward >= target and all(later[1] >= target for later in curve[index + 1 : index + 2]):
            return seconds
    return None


def time_to_reward(trl: Sequence[Curve], loopfast: Sequence[Curve]) -> Json:
    """Returns the result of the race to the reward that TRL reaches within its budget.

    Args:
        trl: a curve for each seed, up to the end of its budget; evaluations take no time.
        loopfast: our curves.

    Returns:
        ``target``, the best of TRL's mean curve; ``trl_seconds``, when TRL's mean curve reaches it;
        ``loopfast_seconds``, when our mean curve reaches it, and ``speedup``, null if ours never does; and each seed's
        time to the same target.
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
