"""Tolerances that the tests of the ops share."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative error of one rounding to nearest.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# float32 arithmetic on a row: a wrong term, factor or element changes the second digit, rounding the sixth.
FLOAT32 = 1e-5


def rms(actual: Tensor, exact: Tensor) -> float:
    """Returns ``|actual - exact| / |exact|``, in float64."""
    actual, exact = actual.detach().cpu().double(), exact.detach().cpu().double()
    assert actual.shape == exact.shape
    if not exact.any():
        return float(actual.abs().sum())
    return float((actual - exact).norm() / exact.norm())
