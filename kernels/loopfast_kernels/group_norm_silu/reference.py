"""Group normalization and SiLU in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reduction import row_sum
from ..transition_logprob.reference import arithmetic_dtype


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Returns values ``[N, C, H, W]`` as ``[N, G, E]``."""
    return values.reshape(values.shape[0], groups, -1)


def _group_sum(values: Tensor) -> Tensor:
    """Returns the sums of ``[N, G, E]``, float64 ``[N, G, 1]``."""
    return row_sum(values.flatten(0, 1)).reshape(*values.shape[:2], 1)


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """Returns ``x + shift`` in the dtype of the arithmetic, contiguous."""
    u = x.to(arithmetic_dtype(x), memory_format=torch.contiguous_format)
    return u if shift is None else u + shift.to(u.dtype)[:, :, None, None]


def _normalized(u: Tensor, statistics: Tensor, groups: int) -> Tensor:
    mean, rest, inverse = statistics.to(u.dtype).split(1, dim=-1)
    return (((_by_group(u, groups) - mean) - rest) * inverse).reshape(u.shape)


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the result and the statistics; the arguments are those of `loopfast_kernels.group_norm_silu`.

    Returns:
        The result like `x`. The statistics ``[N, G, 3]`` in the dtype of the arithmetic: a group's mean, the mean's
        rounding error, and the inverse of the standard deviation.
    """
    u = _shifted(x, shift)
    grouped = _by_group(u, groups)
    count = grouped.shape[-1]
    mean = (_group_sum(grouped) / count).to(u.dtype)
    deviation = grouped - mean
    rest = _group_sum(deviation) / count
    variance = _group_sum(deviation * deviation) / count - rest * rest
    inverse = (variance.clamp(min=0.0) + eps).rsqrt()
    statistics = torch.cat((mean, rest.to(u.dtype), inverse.to(u.dtype)), dim=-1)
    z = _normalized(u, statistics, groups) * _by_channel(weight.to(u.dtype)) + _by_channel(bias.to(u.dtype))
    y = torch.empty_like(x)
    y.copy_(z * torch.sigmoid(z))
    return y, statistics


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    statistics: Tensor,
    groups: int,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients by x, weight, bias and shift.

    Args:
        grad: the gradient by the result, like `x`.
        x: as in the forward pass, like the arguments that are not described here.
        statistics: ``[N, G, 3]``, as the forward pass gave them.
        wanted: for each of the four, whether to compute it.

    Returns:
        Each gradient, like the tensor it belongs to; empty where it is not wanted.
    """
    u = _shifted(x, shift)
    normalized = _normalized(u, statistics, groups)
    scale = _by_channel(weight.to(u.dtype))
    z = normalized * scale + _by_channel(bias.to(u.dtype))
    sigmoid = torch.sigmoid(z)
    grad_z = grad.to(u.dtype) * sigmoid * (1.0 + z * (1.0 - sigmoid))
    nothing = x.new_empty(0)
    grad_x = grad_weight = grad_bias = grad_shift = nothing
    if wanted[1]:
        grad_weight = (grad_z * normalized).double().sum((0, 2, 3)).to(weight.dtype)
    if wanted[2]:
        grad_bias = grad_z.double().sum((0, 2, 3)).to(bias.dtype)
    if wanted[0] or wanted[3]:
        by_normalized, normalized = _by_group(grad_z * scale, groups), _by_group(normalized, groups)
        count = by_normalized.shape[-1]
        mean = (_group_sum(by_normalized) / count).to(u.dtype)
        slope = (_group_sum(by_normalized * normalized) / count).to(u.dtype)
        inverse = statistics[..., 2:].to(u.dtype)
        by_input = ((by_normalized - mean - normalized * slope) * inverse).reshape(u.shape)
        if wanted[0]:
            grad_x = torch.empty_like(x)
            grad_x.copy_(by_input)
        if wanted[3] and shift is not None:
            grad_shift = by_input.double().sum((2, 3)).to(shift.dtype)
    return grad_x, grad_weight, grad_bias, grad_shift
