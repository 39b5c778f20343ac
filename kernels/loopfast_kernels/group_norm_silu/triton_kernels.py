"""Group normalization and SiLU on a GPU: one program for each group of each row.

A program sees its group as a matrix of channels and pixels. Where the matrix fits a tile it is read once, otherwise in
stretches of pixels, once for each pass.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import launch


@triton.jit
def channels_of(group, per_group: tl.constexpr, height: tl.constexpr):
    """A group's channels, and which of them there are."""
    index = tl.arange(0, height)
    return group * per_group + index, index < per_group


@triton.jit
def offsets_of(channel, pixel, channels: tl.constexpr, pixels, channels_last: tl.constexpr):
    """Offsets within a row, ``[channels, pixels]``."""
    if channels_last:
        return channel[:, None] + pixel[None, :] * channels
    return channel[:, None] * pixels + pixel[None, :]


@triton.jit
def mask_of(there, pixel, pixels, width: tl.constexpr, even: tl.constexpr):
    """Which elements of a tile there are; ``even``: the pixels fill whole tiles."""
    if even:
        return there[:, None] & tl.full((1, width), True, tl.int1)
    return there[:, None] & (pixel < pixels)[None, :]


@triton.jit
def load_shift(shift, row, channel, there, channels: tl.constexpr, shifted: tl.constexpr):
    """What is added to a group's channels, as a column."""
    if shifted:
        return tl.load(shift + row * channels + channel, mask=there, other=0.0).to(tl.float32)[:, None]
    return tl.zeros_like(channel).to(tl.float32)[:, None]


@triton.jit
def load_column(values, channel, there):
    """Of weight or bias."""
    return tl.load(values + channel, mask=there, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_deviations(x, offsets, mask, column, mean):
    """``x + shift - mean`` of a tile; 0 outside."""
    return tl.where(mask, tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + column - mean, 0.0)


@triton.jit
def group_norm_silu_kernel(
    y,
    statistics,
    x,
    weight,
    bias,
    shift,
    eps,
    pixels,
    groups: tl.constexpr,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    shifted: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    even: tl.constexpr,
    single: tl.constexpr,
):
    """Result and statistics of one group."""
    program = tl.program_id(0).to(tl.int64)
    row, group = program // groups, (program % groups).to(tl.int32)
    per_group: tl.constexpr = channels // groups
    count = tl.full((), per_group * pixels, tl.float32)
    # known when compiled: the one tile of a small group stays in registers
    end = width if single else pixels
    channel, there = channels_of(group, per_group, height)
    column = load_shift(shift, row, channel, there, channels, shifted)
    x += row * channels * pixels
    y += row * channels * pixels
    pixel = tl.arange(0, width)

    sums = tl.zeros((height, width), tl.float32)
    for start in range(0, end, width):
        offsets = offsets_of(channel, pixel + start, channels, pixels, channels_last)
        mask = mask_of(there, pixel + start, pixels, width, even)
        sums += load_deviations(x, offsets, mask, column, 0.0)
    mean = tl.div_rn(tl.sum(tl.sum(sums, axis=1), axis=0), count)

    # The deviations' own mean corrects that of the first pass: Chan, Golub and LeVeque's corrected two-pass algorithm.
    sums = tl.zeros((height, width), tl.float32)
    squares = tl.zeros((height, width), tl.float32)
    for start in range(0, end, width):
        offsets = offsets_of(channel, pixel + start, channels, pixels, channels_last)
        mask = mask_of(there, pixel + start, pixels, width, even)
        deviations = load_deviations(x, offsets, mask, column, mean)
        sums += deviations
        squares += deviations * deviations
    rest = tl.div_rn(tl.sum(tl.sum(sums, axis=1), axis=0), count)
    square = tl.div_rn(tl.sum(tl.sum(squares, axis=1), axis=0), count)
    variance = tl.maximum(square - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    tl.store(statistics + program * 3, mean)
    tl.store(statistics + program * 3 + 1, rest)
    tl.store(statistics + program * 3 + 2, inverse)

    scale = inverse * load_column(weight, channel, there)
    offset = load_column(bias, channel, there) - rest * scale
    for start in range(0, end, width):
        offsets = offsets_of(channel, pixel + start, channels, pixels, channels_last)
        mask = mask_of(there, pixel + start, pixels, width, even)
        z = load_deviations(x, offsets, mask, column, mean) * scale + offset
        tl.store(y + offsets, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gradient_of_z(grad, offsets, mask, deviations, scale, offset):
    """The gradient by what goes into the SiLU; 0 outside."""
    z = deviations * scale + offset
    sigmoid = tl.sigmoid(z)
    slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    return tl.where(mask, tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32) * slope, 0.0)


@triton.jit
def group_norm_silu_backward_kernel(
    grad_x,
    grad_shift,
    of_weight,
    of_bias,
    grad,
    x,
    weight,
    bias,
    shift,
    statistics,
    pixels,
    groups: tl.constexpr,
    channels: tl.constexpr,
    channels_last: tl.constexpr,
    shifted: tl.constexpr,
    with_x: tl.constexpr,
    with_shift: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    even: tl.constexpr,
    single: tl.constexpr,
):
    """Gradients by one group's elements and shifts, and its row's part of those by weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    row, group = program // groups, (program % groups).to(tl.int32)
    per_group: tl.constexpr = channels // groups
    count = tl.full((), per_group * pixels, tl.float32)
    # known when compiled: the one tile of a small group stays in registers
    end = width if single else pixels
    channel, there = channels_of(group, per_group, height)
    column = load_shift(shift, row, channel, there, channels, shifted)
    mean = tl.load(statistics + program * 3)
    rest = tl.load(statistics + program * 3 + 1)
    inverse = tl.load(statistics + program * 3 + 2)
    scale = inverse * load_column(weight, channel, there)
    offset = load_column(bias, channel, there) - rest * scale
    x += row * channels * pixels
    grad += row * channels * pixels
    pixel = tl.arange(0, width)

    sums = tl.zeros((height, width), tl.float32)
    products = tl.zeros((height, width), tl.float32)
    for start in range(0, end, width):
        offsets = offsets_of(channel, pixel + start, channels, pixels, channels_last)
        mask = mask_of(there, pixel + start, pixels, width, even)
        deviations = load_deviations(x, offsets, mask, column, mean)
        slope = gradient_of_z(grad, offsets, mask, deviations, scale, offset)
        sums += slope
        products += slope * deviations
    of_channel = tl.sum(sums, axis=1)
    by_normalized = (tl.sum(products, axis=1) - rest * of_channel) * inverse
    tl.store(of_bias + row * channels + channel, of_channel, mask=there)
    tl.store(of_weight + row * channels + channel, by_normalized, mask=there)

    if with_x or with_shift:
        weights = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
        slope_of_group = -inverse * inverse * tl.div_rn(tl.sum(weights * by_normalized, axis=0), count)
        constant = -inverse * tl.div_rn(tl.sum(weights * of_channel, axis=0), count) - slope_of_group * rest
        grad_x += row * channels * pixels
        sums = tl.zeros((height, width), tl.float32)
        for start in range(0, end, width):
            offsets = offsets_of(channel, pixel + start, channels, pixels, channels_last)
            mask = mask_of(there, pixel + start, pixels, width, even)
            deviations = load_deviations(x, offsets, mask, column, mean)
            slope = gradient_of_z(grad, offsets, mask, deviations, scale, offset)
            values = scale * slope + (slope_of_group * deviations + constant)
            if with_x:
                tl.store(grad_x + offsets, values.to(grad_x.dtype.element_ty), mask=mask)
            sums += tl.where(mask, values, 0.0)
        if with_shift:
            total = tl.sum(sums, axis=1).to(grad_shift.dtype.element_ty)
            tl.store(grad_shift + row * channels + channel, total, mask=there)


@triton.jit
def sum_rows_kernel(result, values, rows, channels, height: tl.constexpr, width: tl.constexpr):
    """``[N, C]`` to ``[C]``, ``width`` channels for each program."""
    channel = tl.program_id(0) * width + tl.arange(0, width)
    sums = tl.zeros((height, width), tl.float32)
    for start in range(0, rows, height):
        row = start + tl.arange(0, height)
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        sums += tl.load(values + row[:, None] * channels + channel[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, axis=0).to(result.dtype.element_ty)
    tl.store(result + channel, total, mask=channel < channels)


def _tile(x: Tensor, groups: int, largest: int) -> dict[str, Any]:
    """How programs see a group: sizes, and the tile of up to `largest` elements that they keep at a time.

    A kernel is compiled for each number of channels, but not of pixels: a model has several sizes of image.
    """
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    height = triton.next_power_of_2(channels // groups)
    width = min(triton.next_power_of_2(pixels), max(largest // height, 1))
    return {
        "pixels": pixels,
        "groups": groups,
        "channels": channels,
        "channels_last": not x.is_contiguous(),
        "height": height,
        "width": width,
        "even": pixels % width == 0,
        "single": pixels <= width,
        "num_warps": min(max(height * width // 512, 1), 8),
        # 16 warps fit a multiprocessor; without a limit ptxas sometimes spills at 64 to 80 registers
        "maxnreg": 128,
    }


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Result and statistics; as in `reference`."""
    y = torch.empty_like(x)
    statistics = x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)
    launch(
        group_norm_silu_kernel,
        (x.shape[0] * groups,),
        y,
        statistics,
        x,
        weight,
        bias,
        shift,
        eps,
        shifted=shift is not None,
        **_tile(x, groups, 8192),
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
    """Gradients by x, weight, bias and shift, empty where not wanted; as in `reference`."""
    grad_x, grad_weight, grad_bias, grad_shift = (
        torch.empty_like(tensor) if want and tensor is not None else x.new_empty(0)
        for tensor, want in zip((x, weight, bias, shift), wanted, strict=True)
    )
    rows, channels = x.shape[:2]
    of_weight, of_bias = x.new_empty((2, rows, channels), dtype=torch.float32)
    launch(
        group_norm_silu_backward_kernel,
        (rows * groups,),
        grad_x,
        grad_shift,
        of_weight,
        of_bias,
        grad,
        x,
        weight,
        bias,
        shift,
        statistics,
        shifted=shift is not None,
        with_x=wanted[0],
        with_shift=wanted[3],
        **_tile(x, groups, 4096),
    )
    for result, values, want in ((grad_weight, of_weight, wanted[1]), (grad_bias, of_bias, wanted[2])):
        if want:
            grid = (triton.cdiv(channels, 32),)
            launch(sum_rows_kernel, grid, result, values, rows, channels, height=32, width=32, num_warps=4)
    return grad_x, grad_weight, grad_bias, grad_shift
