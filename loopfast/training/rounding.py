"""How far rounding alone can take the ratio before the first update from 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from loopfast.schedules import TransitionSchedule

# A network's outputs are off by 16 units in the last place, as 256 roundings in a row make them, whose errors add up as
# their root; and the largest of many pairs is some six standard deviations off.
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
    """The largest change of a transition's log-probability that a model's rounding explains.

    Outputs have elements of about 1, and noise too. A relative error of δ in D outputs moves the mean by b·δ each, and
    the log-probability by (b/σ)·δ·√D times a standard normal number.

    Args:
        schedule: the sampler's transitions.
        steps: those that are trained on.
        dtype: the model computes in.
        shape: of a latent, D elements.
        guidance_scale: s; of the two outputs, the conditional one is taken s times and the other 1 − s times.
        mean: whether the log-probability is a mean over the elements instead of a sum.
    """
    sensitivity = max(float(schedule.sensitivity[step]) for step in steps)
    guided = math.hypot(guidance_scale, 1.0 - guidance_scale)
    elements = math.prod(shape)
    bound = _UNITS * torch.finfo(dtype).eps * guided * math.sqrt(sensitivity * elements)
    return bound / elements if mean else bound
