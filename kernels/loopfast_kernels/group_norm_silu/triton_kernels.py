"""Group normalization and SiLU on a GPU: one program for each group of each row.

A program sees its group as a matrix of channels and pixels. If the matrix fits a tile, it is read once; a larger one
is read in parts of some pixels, once for each pass.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import launch


class Layout(NamedTuple):
    """The constants of a call: the layout of the image, and the tile of a group that a program keeps at a time.

    A kernel is compiled for each number of channels, but not for each number of pixels: a model has several sizes of
    image.

    Attributes:
        height: rows of the tile, the channels of a group rounded up to a power of two.
        width: pixels of the tile.
        even: the pixels fill whole tiles.
        single: a group fits one tile.
    """

    groups: int
    channels: int
    channels_last: bool
    height: int
    width: int
    even: bool
    single: bool


@triton.jit
def load_channels(group, LAYOUT: tl.constexpr):
    """Returns a group's channels ``[height]``, and a mask of those that exist."""
    index = tl.arange(0, LAYOUT.height)
    per_group: tl.constexpr = LAYOUT.channels // LAYOUT.groups
    return group * per_group + index, index < per_group


@triton.jit
def tile_at(start, channel, exists, pixels, LAYOUT: tl.constexpr):
    """Returns the offsets within a row, ``[height, width]``, of the tile that begins at a pixel, and its mask."""
    pixel = tl.arange(0, LAYOUT.width) + start
    if LAYOUT.channels_last:
        offsets = channel[:, None] + pixel[None, :] * LAYOUT.channels
    else:
        offsets = channel[:, None] * pixels + pixel[None, :]
    if LAYOUT.even:
        mask = exists[:, None] & tl.full((1, LAYOUT.width), True, tl.int1)
    else:
        mask = exists[:, None] & (pixel < pixels)[None, :]
    return offsets, mask


@triton.jit
def load_shift(
    shift,  # [N, C] or None
    row,
    channel,
    exists,
    LAYOUT: tl.constexpr,
):
    """Returns the shifts of a group's channels as a column, 0 without shifts."""
    if shift is None:
        column = tl.zeros_like(channel).to(tl.float32)
    else:
        column = tl.load(shift + row * LAYOUT.channels + channel, mask=exists, other=0.0).to(tl.float32)
    return column[:, None]


@triton.jit
def load_column(
    values,  # [C]
    channel,
    exists,
):
    """Returns weight or bias of a group's channels as a column."""
    return tl.load(values + channel, mask=exists, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_deviations(
    x,  # [C, H, W], one row
    offsets,
    mask,
    shift,  # [height, 1]
    mean,
):
    """Returns ``x + shift - mean`` of a tile; 0 outside."""
    return tl.where(mask, tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) + shift - mean, 0.0)


@triton.jit
def group_norm_silu_kernel(
    y,  # [N, C, H, W]
    statistics,  # float32 [N, G, 3]
    x,  # [N, C, H, W]
    weight,  # [C]
    bias,  # [C]
    shift,  # [N, C] or None
    eps,
    pixels,
    LAYOUT: tl.constexpr,
):
    """Writes the result and the statistics of one group."""
    height: tl.constexpr = LAYOUT.height
    width: tl.constexpr = LAYOUT.width
    program = tl.program_id(0).to(tl.int64)
    row, group = program // LAYOUT.groups, (program % LAYOUT.groups).to(tl.int32)
    count = tl.full((), LAYOUT.channels // LAYOUT.groups * pixels, tl.float32)
    # This is known when the kernel is compiled: the one tile of a small group stays in registers.
    end = width if LAYOUT.single else pixels
    channel, exists = load_channels(group, LAYOUT)
    column = load_shift(shift, row, channel, exists, LAYOUT)
    x += row * LAYOUT.channels * pixels
    y += row * LAYOUT.channels * pixels

    sums = tl.zeros((height, width), tl.float32)
    for start in range(0, end, width):
        offsets, mask = tile_at(start, channel, exists, pixels, LAYOUT)
        sums += load_deviations(x, offsets, mask, column, 0.0)
    mean = tl.div_rn(tl.sum(tl.sum(sums, axis=1), axis=0), count)

    # The deviations' own mean corrects that of the first pass: Chan, Golub and LeVeque's corrected two-pass algorithm.
    sums = tl.zeros((height, width), tl.float32)
    squares = tl.zeros((height, width), tl.float32)
    for start in range(0, end, width):
        offsets, mask = tile_at(start, channel, exists, pixels, LAYOUT)
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

    scale = inverse * load_column(weight, channel, exists)
    offset = load_column(bias, channel, exists) - rest * scale
    for start in range(0, end, width):
        offsets, mask = tile_at(start, channel, exists, pixels, LAYOUT)
        z = load_deviations(x, offsets, mask, column, mean) * scale + offset
        tl.store(y + offsets, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gradient_of_z(
    grad,  # [C, H, W], one row
    offsets,
    mask,
    deviations,
    scale,
    offset,
):
    """Returns the gradient by the argument of the SiLU; 0 outside."""
    z = deviations * scale + offset
    sigmoid = tl.sigmoid(z)
    slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    return tl.where(mask, tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32) * slope, 0.0)


@triton.jit
def group_norm_silu_backward_kernel(
    grad_x,  # [N, C, H, W] or None
    grad_shift,  # [N, C] or None
    weight_sums,  # float32 [N, C], each row's part of the gradient by weight
    bias_sums,  # float32 [N, C], each row's part of the gradient by bias
    grad,  # [N, C, H, W]
    x,  # [N, C, H, W]
    weight,  # [C]
    bias,  # [C]
    shift,  # [N, C] or None
    statistics,  # float32 [N, G, 3]
    pixels,
    LAYOUT: tl.constexpr,
):
    """Writes the gradients by one group's elements and shifts, and the row's part of those by weight and bias."""
    height: tl.constexpr = LAYOUT.height
    width: tl.constexpr = LAYOUT.width
    program = tl.program_id(0).to(tl.int64)
    row, group = program // LAYOUT.groups, (program % LAYOUT.groups).to(tl.int32)
    count = tl.full((), LAYOUT.channels // LAYOUT.groups * pixels, tl.float32)
    # This is known when the kernel is compiled: the one tile of a small group stays in registers.
    end = width if LAYOUT.single else pixels
    channel, exists = load_channels(group, LAYOUT)
    column = load_shift(shift, row, channel, exists, LAYOUT)
    mean = tl.load(statistics + program * 3)
    rest = tl.load(statistics + program * 3 + 1)
    inverse = tl.load(statistics + program * 3 + 2)
    scale = inverse * load_column(weight, channel, exists)
    offset = load_column(bias, channel, exists) - rest * scale
    x += row * LAYOUT.channels * pixels
    grad += row * LAYOUT.channels * pixels

    sums = tl.zeros((height, width), tl.float32)
    products = tl.zeros((height, width), tl.float32)
    for start in range(0, end, width):
        offsets, mask = tile_at(start, channel, exists, pixels, LAYOUT)
        deviations = load_deviations(x, offsets, mask, column, mean)
        slope = gradient_of_z(grad, offsets, mask, deviations, scale, offset)
        sums += slope
        products += slope * deviations
    by_bias = tl.sum(sums, axis=1)
    by_weight = (tl.sum(products, axis=1) - rest * by_bias) * inverse
    tl.store(bias_sums + row * LAYOUT.channels + channel, by_bias, mask=exists)
    tl.store(weight_sums + row * LAYOUT.channels + channel, by_weight, mask=exists)

    if grad_x is not None or grad_shift is not None:
        weights = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
        slope_of_group = -inverse * inverse * tl.div_rn(tl.sum(weights * by_weight, axis=0), count)
        constant = -inverse * tl.div_rn(tl.sum(weights * by_bias, axis=0), count) - slope_of_group * rest
        if grad_x is not None:
            grad_x += row * LAYOUT.channels * pixels
        sums = tl.zeros((height, width), tl.float32)
        for start in range(0, end, width):
            offsets, mask = tile_at(start, channel, exists, pixels, LAYOUT)
            deviations = load_deviations(x, offsets, mask, column, mean)
            slope = gradient_of_z(grad, offsets, mask, deviations, scale, offset)
            values = scale * slope + (slope_of_group * deviations + constant)
            if grad_x is not None:
                tl.store(grad_x + offsets, values.to(grad_x.dtype.element_ty), mask=mask)
            sums += tl.where(mask, values, 0.0)
        if grad_shift is not None:
            total = tl.sum(sums, axis=1).to(grad_shift.dtype.element_ty)
            tl.store(grad_shift + row * LAYOUT.channels + channel, total, mask=exists)


@triton.jit
def sum_rows_kernel(
    result,  # [C]
    values,  # float32 [N, C]
    rows,
    channels,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes the sums over rows of ``WIDTH`` channels."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, rows, HEIGHT):
        row = start + tl.arange(0, HEIGHT)
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        sums += tl.load(values + row[:, None] * channels + channel[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, axis=0).to(result.dtype.element_ty)
    tl.store(result + channel, total, mask=channel < channels)


def _options(x: Tensor, groups: int, largest: int) -> dict[str, Any]:
    """Returns the launch's options for tiles of up to `largest` elements."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    height = triton.next_power_of_2(channels // groups)
    width = min(triton.next_power_of_2(pixels), max(largest // height, 1))
    return {
        "LAYOUT": Layout(
            groups=groups,
            channels=channels,
            channels_last=not x.is_contiguous(),
            height=height,
            width=width,
            even=pixels % width == 0,
            single=pixels <= width,
        ),
        "num_warps": min(max(height * width // 512, 1), 8),
        # 16 warps fit a multiprocessor; without a limit ptxas sometimes spills at 64 to 80 registers
        "maxnreg": 128,
    }


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the result and the statistics, as `reference` does."""
    y = torch.empty_like(x)
    statistics = x.new_empty((x.shape[0], groups, 3), dtype=torch.float32)
    pixels = x.shape[2] * x.shape[3]
    launch(
        group_norm_silu_kernel,
        (x.shape[0] * groups,),
        *(y, statistics, x, weight, bias, shift, eps, pixels),
        **_options(x, groups, 8192),
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
        torch.empty_like(tensor) if want and tensor is not None else None
        for tensor, want in zip((x, weight, bias, shift), wanted, strict=True)
    )
    rows, channels = x.shape[:2]
    weight_sums, bias_sums = x.new_empty((2, rows, channels), dtype=torch.float32)
    launch(
        group_norm_silu_backward_kernel,
        (rows * groups,),
        *(grad_x, grad_shift, weight_sums, bias_sums, grad, x, weight, bias, shift, statistics),
        x.shape[2] * x.shape[3],
        **_options(x, groups, 4096),
    )
    for result, values in ((grad_weight, weight_sums), (grad_bias, bias_sums)):
        if result is not None:
            grid = (triton.cdiv(channels, 32),)
            launch(sum_rows_kernel, grid, result, values, rows, channels, HEIGHT=32, WIDTH=32, num_warps=4)
    nothing = x.new_empty(0)
    gradients = (grad_x, grad_weight, grad_bias, grad_shift)
    return tuple(nothing if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]
