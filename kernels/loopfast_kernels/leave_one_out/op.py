"""Registration of ``loopfast::leave_one_out``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..registration import Operator
from ..validation import REAL_DTYPES, check_tensor

_IMPLEMENTATIONS = backends.Implementations(__package__, "leave_one_out")


class _LeaveOneOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rewards: Tensor) -> Tensor:
        result: Tensor = _leave_one_out.below_autograd(rewards)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The map is linear and symmetric: its own transpose.
        result: Tensor = _leave_one_out(grad.contiguous())
        return result


_leave_one_out = Operator(
    "leave_one_out(Tensor rewards) -> Tensor",
    lambda rewards: _IMPLEMENTATIONS.choose(rewards)(rewards),
    torch.empty_like,
    _LeaveOneOut,
)


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
    result: Tensor = _leave_one_out(rewards)
    return result


def check_group(rewards: Tensor) -> None:
    """Check that the last dimension of `rewards` is a group with others in it.

    Raises:
        ValueError: it is not.
    """
    if rewards.dim() == 0 or rewards.numel() == 0:
        raise ValueError(f"rewards must have shape [..., K] with elements in it, got {list(rewards.shape)}")
    if rewards.shape[-1] == 1:
        raise ValueError("rewards has K = 1 sample per group: leave-one-out needs at least 2")
