"""Confidence intervals of means by the bootstrap: the spread of a mean over other prompts of the same kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loopfast.seeds import generator

RESAMPLES = 10_000
LEVEL = 0.95
# Draw at most this many values at a time, so that memory does not grow with the number of prompts.
_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval; ``low <= mean <= high``."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The three numbers by name."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def mean_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The mean of P values and its percentile bootstrap interval (Efron, 1979).

    P values are drawn with replacement ``resamples`` times. The bounds are quantiles of the means. For the difference
    of two models that were measured on the same prompts, pass the P differences; each pair is then drawn together.

    Args:
        values: P finite numbers, each the mean over one prompt's images.
        seed: the seed of the draws; the same seed gives the same bounds.
        resamples: the number of resamples.
        level: the confidence, in (0, 1).

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"mean_interval needs one finite value or more, got {len(values)} value(s)")
    sample = torch.tensor(values, dtype=torch.float64)
    mean = math.fsum(values) / len(values)
    random = generator(seed, "bootstrap", len(values))
    rows = max(1, _AT_ONCE // len(values))
    shapes = [(min(rows, resamples - done), len(values)) for done in range(0, resamples, rows)]
    draws = (torch.randint(len(values), shape, generator=random) for shape in shapes)
    means = torch.cat([sample[drawn].mean(1) for drawn in draws])
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    # rounding, or few resamples of a skewed sample, may leave the mean slightly outside
    return Interval(mean, min(low, mean), max(high, mean))
