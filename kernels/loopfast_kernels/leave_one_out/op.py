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
    lambda arguments: _IMPLEMENTATIONS.choose(arguments.rewards)(arguments.rewards),
    lambda arguments: torch.empty_like(arguments.rewards),
    _LeaveOneOut,
)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Returns the advantage of each sample over the others of its group: ``r_i - mean(r_j, j != i)``.

    This is the baseline of RLOO and LOOP (Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", 2019).

    Args:
        rewards: float32 or float64 ``[..., K]``; the last dimension is the group.

    Returns:
        Advantages, like `rewards`, differentiable. Each group's sum is 0; equal rewards give exactly 0.

    Raises:
        TypeError: `rewards` is not a float32 or float64 tensor.
        ValueError: ``K`` is 1, so that no other sample exists, or `rewards` is empty.
    """
    check_tensor("rewards", rewards, dtypes=REAL_DTYPES)
    check_group(rewards)
    result: Tensor = _leave_one_out(rewards)
    return result


def check_group(rewards: Tensor) -> None:
    """Checks that `rewards` holds groups of at least two samples.

    Raises:
        ValueError: `rewards` is empty, or its last dimension is 1.
    """
    if rewards.dim() == 0 or rewards.numel() == 0:
        raise ValueError(f"rewards must have shape [..., K] with elements in it, got {list(rewards.shape)}")
    if rewards.shape[-1] == 1:
        raise ValueError("rewards has K = 1 sample per group: leave-one-out needs at least 2")
