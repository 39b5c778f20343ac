"""Bounds how far rounding alone can move the ratio before the first update from 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from loopfast.schedules import TransitionSchedule

# A network's outputs are off by 16 units in the last place: 256 successive roundings, whose errors add up as the square
# root of their number. The largest of many pairs is about six standard deviations off.
_UNITS = 16 * 6


def rounding_bound(
    schedule: TransitionSchedule,
    steps: Iterable[int],
    *,
    dtype: torch.dtype,
    shape: Sequence[int],
    guidance_scale: float = 1.0,
    mean: bool = False,
) -> float:
    """Returns the largest change of a transition's log-probability that a model's rounding explains.

    The elements of outputs and noise are about 1. A relative error of δ in D outputs moves the mean by b·δ each, and
    the log-probability by (b/σ)·δ·√D times a standard normal number.

    Args:
        schedule: the sampler's transitions.
        steps: the trained steps.
        dtype: the dtype that the model computes in.
        shape: the shape of a latent, D elements.
        guidance_scale: s, the weight of the conditional output; the unconditional one has the weight 1 − s.
        mean: whether the log-probability is a mean over the elements instead of a sum.
    """
    sensitivity = max(float(schedule.sensitivity[step]) for step in steps)
    guided = math.hypot(guidance_scale, 1.0 - guidance_scale)
    elements = math.prod(shape)
    bound = _UNITS * torch.finfo(dtype).eps * guided * math.sqrt(sensitivity * elements)
    return bound / elements if mean else bound
