"""The sum of rewards that a run trains on, where the scale of some is that of the iteration's images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopfast.algorithms import EPSILON, deviations, spread
from loopfast.config import RewardConfig
from loopfast.errors import RewardError
from loopfast.rewards.base import Scores, scaled

__all__ = ["bounds", "training_total"]


def training_total(terms: Sequence[RewardConfig], scores: Scores, samples: int) -> Tensor:
    """The weighted sum of an iteration's rewards, for a term with ``normalize: std`` of ``(value − mean) / std``.

    Mean and standard deviation are of all images that count, worked out in float64 and in their order: they depend
    neither on the batches the images were scored in nor on the processes that did. Without such a term the sum is
    `Scores.total`.

    Args:
        terms: the configuration's, by whose titles `Scores.parts` are named.
        scores: of the images of all processes, the K of a prompt side by side.
        samples: K.

    Returns:
        Float32 ``[G, K]``; NaN for all images of a prompt if a score of one of them is not finite: they do not count.

    Raises:
        RewardError: the sum of finite scores is not finite.
    """
    counted = scores.total.isfinite().view(-1, samples).all(1).repeat_interleave(samples)
    result = scores.total.masked_fill(~counted, torch.nan)
    if any(term.normalize == "std" for term in terms):
        total = torch.zeros(int(counted.sum()), dtype=torch.float64)
        for term in terms:
            values = scores.parts[term.title][counted].double()
            if term.normalize == "std":
                values = deviations(values) / (spread(values) + EPSILON)
            total += term.weight * scaled(values, bounds(term))
        result[counted] = total.float()
        if not result[counted].isfinite().all():
            raise RewardError("the weighted sum of the normalized rewards is not finite")
    return result.view(-1, samples)


def bounds(term: RewardConfig) -> tuple[float, float] | None:
    """The values that count as 0 and 1, if that is how the term is normalized."""
    if term.normalize != "range" or term.range is None:
        return None
    low, high = term.range
    return low, high
