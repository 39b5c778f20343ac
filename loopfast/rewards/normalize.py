"""The rewards that a run trains on: the weighted sum, with some of its terms standardized over the iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopfast.algorithms import EPSILON, deviations, spread
from loopfast.config import RewardConfig
from loopfast.errors import RewardError
from loopfast.rewards.base import Scores, scaled

__all__ = ["bounds", "training_rewards"]


def training_rewards(terms: Sequence[RewardConfig], scores: Scores, samples: int) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of an iteration's rewards, and which prompts are kept.

    A term with ``normalize: std`` is ``(value − mean) / std``. Mean and standard deviation are those of all images of
    the prompts that are kept. They are computed in float64 and in the images' order: they depend neither on the batches
    the images were scored in nor on the processes that scored them. Without such a term the sum is `Scores.total`.

    Args:
        terms: the rewards of the configuration; `Scores.parts` are named by their titles.
        scores: scores of all processes' images, the K of a prompt side by side.
        samples: K.

    Returns:
        ``(rewards, kept)``. ``kept``: bool ``[G]``, whether all scores of a prompt's images are finite. ``rewards``:
        float32 ``[G, K]``; NaN for all images of a prompt that is not kept.

    Raises:
        RewardError: the sum of finite scores is not finite.
    """
    kept = scores.total.isfinite().view(-1, samples).all(1)
    rows = kept.repeat_interleave(samples)
    result = scores.total.masked_fill(~rows, torch.nan)
    if any(term.normalize == "std" for term in terms):
        total = torch.zeros(int(rows.sum()), dtype=torch.float64)
        for term in terms:
            values = scores.parts[term.title][rows].double()
            if term.normalize == "std":
                values = deviations(values) / (spread(values) + EPSILON)
            total += term.weight * scaled(values, bounds(term))
        result[rows] = total.float()
        if not result[rows].isfinite().all():
            raise RewardError("the weighted sum of the normalized rewards is not finite")
    return result.view(-1, samples), kept


def bounds(term: RewardConfig) -> tuple[float, float] | None:
    """Returns the two values that count as 0 and 1; None if the term is normalized in another way."""
    if term.normalize != "range" or term.range is None:
        return None
    low, high = term.range
    return low, high
