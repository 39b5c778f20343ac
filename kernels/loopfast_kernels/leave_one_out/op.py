"""Registration of ``loopfast::leave_one_out``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..validation import REAL_DTYPES, check_tensor
from . import reference

_IMPLEMENTATIONS = {"reference": reference.leave_one_out}


@torch.library.custom_op("loopfast::leave_one_out", mutates_args=(), schema="(Tensor rewards) -> Tensor")
def _leave_one_out(rewards: Tensor) -> Tensor:
    return backends.choose(_IMPLEMENTATIONS)(rewards)


@_leave_one_out.register_fake
def _(rewards: Tensor) -> Tensor:
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    # The map is linear and symmetric: its own transpose.
    return _leave_one_out(grad)


_leave_one_out.register_autograd(_backward)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantage of each sample over the other samples of its group: ``r_i - mean(r_j, j != i)``.

    The baseline of RLOO and LOOP (Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", 2019).

    Args:
        rewards: float32 or float64 ``[..., K]``; the last dimension is the group.

    Returns:
        Advantages, like `rewards`. Each group's sum is 0; a group of equal rewards gives exactly 0.
        Differentiable.

    Raises:
        TypeError: `rewards` is not a float32 or float64 tensor.
        ValueError: ``K`` is 1, where there is no other sample, or `rewards` is empty.
    """
    check_tensor("rewards", rewards, dtypes=REAL_DTYPES)
    check_group(rewards)
    return _leave_one_out(rewards)


def check_group(rewards: Tensor) -> None:
    """Check that the last dimension of `rewards` is a group with others in it.

    Raises:
        ValueError: it is not.
    """
    if rewards.dim() == 0 or rewards.numel() == 0:
        raise ValueError(f"rewards must have shape [..., K] with elements in it, got {list(rewards.shape)}")
    if rewards.shape[-1] == 1:
        raise ValueError("rewards has K = 1 sample per group: leave-one-out needs at least 2")
