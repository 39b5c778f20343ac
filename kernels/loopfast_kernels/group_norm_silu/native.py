"""Group normalization and SiLU in the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers import empty_like
from ..native_library import Norm, call, image, latents


def _norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float) -> Norm:
    rows, channels, height, width = x.shape
    return Norm(
        rows,
        channels,
        height * width,
        groups,
        not x.is_contiguous(),
        eps,
        image("x", x),
        latents("weight", weight),
        latents("bias", bias),
        latents("shift", shift),
        torch.get_num_threads(),
    )


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the result and the statistics, as `reference` does."""
    y = empty_like(x)
    statistics = x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)
    call(
        "loopfast_group_norm_silu",
        _norm(x, weight, bias, shift, groups, eps),
        image("y", y),
        statistics.data_ptr(),
    )
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
    """Returns the gradients by x, weight, bias and shift, as `reference` does."""
    grad_x, grad_weight, grad_bias, grad_shift = (
        empty_like(tensor) if want and tensor is not None else x.new_empty(0)
        for tensor, want in zip((x, weight, bias, shift), wanted, strict=True)
    )
    call(
        "loopfast_group_norm_silu_backward",
        _norm(x, weight, bias, shift, groups, eps),
        statistics.data_ptr(),
        image("grad", grad),
        image("grad_x", grad_x),
        latents("grad_weight", grad_weight),
        latents("grad_bias", grad_bias),
        latents("grad_shift", grad_shift),
    )
    return grad_x, grad_weight, grad_bias, grad_shift
