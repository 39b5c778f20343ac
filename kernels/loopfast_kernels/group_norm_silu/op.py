"""Registration of ``loopfast::group_norm_silu`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..registration import Operator
from ..transition_logprob.reference import arithmetic_dtype
from ..validation import LATENT_DTYPES, check_tensor

_FORWARD = backends.Implementations(__package__, "group_norm_silu")
_BACKWARD = backends.Implementations(__package__, "group_norm_silu_backward")

_TENSORS = "Tensor x, Tensor weight, Tensor bias, Tensor? shift"


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.groups, ctx.eps = inputs
        y, statistics = _group_norm_silu.below_autograd(*inputs)
        ctx.save_for_backward(*tensors, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, *rest = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:4])
        grad = grad.contiguous(memory_format=_memory_format(x))
        grads = _group_norm_silu_backward(grad, x, *rest, ctx.groups, ctx.eps, wanted)
        return *(value if want else None for value, want in zip(grads, wanted, strict=True)), None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    """Returns the format of a dense image; contiguous where both fit."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _fake(arguments: Any) -> tuple[Tensor, Tensor]:
    x: Tensor = arguments.x
    return torch.empty_like(x), x.new_empty((x.shape[0], arguments.groups, 3), dtype=arithmetic_dtype(x))


def _fake_backward(arguments: Any) -> tuple[Tensor, ...]:
    tensors = (arguments.x, arguments.weight, arguments.bias, arguments.shift)
    return tuple(
        torch.empty_like(tensor) if want and tensor is not None else arguments.grad.new_empty(0)
        for tensor, want in zip(tensors, arguments.wanted, strict=True)
    )


_group_norm_silu = Operator(
    f"group_norm_silu({_TENSORS}, int groups, float eps) -> (Tensor, Tensor)",
    lambda arguments: _FORWARD.choose(arguments.x)(*arguments),
    _fake,
    _GroupNormSilu,
)
_group_norm_silu_backward = Operator(
    f"group_norm_silu_backward(Tensor grad, {_TENSORS}, Tensor statistics, int groups, float eps, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda arguments: _BACKWARD.choose(arguments.x)(*arguments),
    _fake_backward,
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    shift: Tensor | None = None,
) -> Tensor:
    """Returns ``silu(group_norm(x + shift[:, :, None, None], groups, weight, bias, eps))`` in one kernel.

    Convolutional denoisers have group normalization (Wu and He, 2018) and SiLU in every residual block; the shift is
    the time embedding that the block adds. Mean and variance are exact to rounding however large the mean is.

    Args:
        x: ``[N, C, H, W]``, float32, float16, bfloat16 or float64; contiguous or ``torch.channels_last``.
        weight: ``[C]``, float32 or of the dtype of `x`.
        bias: ``[C]``, float32 or of the dtype of `x`.
        groups: the number of groups of channels; it divides C.
        eps: a positive number that is added to the variance.
        shift: ``[N, C]``, of the dtype of `x`.

    Returns:
        A tensor like `x`, in its memory format. It is differentiable, once, in every tensor; autograd keeps the
        inputs and three float32 numbers for each group. A row's result does not depend on the others.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device, memory format or value.
    """
    check_tensor("x", x, dtypes=LATENT_DTYPES, channels_last=True)
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must have shape [N, C, H, W] with elements in it, got {list(x.shape)}")
    channels, device = x.shape[1], x.device
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}")
    dtypes = (x.dtype,) if x.dtype == torch.float32 else (torch.float32, x.dtype)
    check_tensor("weight", weight, dtypes=dtypes, shape=(channels,), device=device)
    check_tensor("bias", bias, dtypes=dtypes, shape=(channels,), device=device)
    if shift is not None:
        check_tensor("shift", shift, dtypes=(x.dtype,), shape=(x.shape[0], channels), device=device)
    result: Tensor = _group_norm_silu(x, weight, bias, shift, groups, float(eps))[0]
    return result
