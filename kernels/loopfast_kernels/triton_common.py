"""What the Triton kernels share: launches, the partition of a row, sums in a fixed order."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor, in that device's current stream.

    Multiplications and additions are never fused behind our back: how a compiler pairs them differs from kernel
    to kernel, and a row's log-probability has to have the same bits in all of them.
    """
    with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, Tensor))):
        kernel[grid](*arguments, **options, num_stages=1, enable_fp_fusion=False)


class Partition(NamedTuple):
    """How a row is cut into programs.

    A row is padded to a power of two and seen as a matrix of ``height`` rows, in row-major order. Each of the
    row's ``programs`` takes ``width`` columns. `fold` adds the rows of that matrix first, so what a program does
    alone is a part of one and the same sum, whatever the partition is.
    """

    padded: int
    height: int
    width: int
    programs: int
    num_warps: int

    @property
    def columns(self) -> int:
        """Partial sums that the programs of a row leave."""
        return self.padded // self.height

    @property
    def registers(self) -> int | None:
        """Limit of a thread's registers: all there are for a whole row, as ptxas sometimes spills below it."""
        return min(2048 // self.num_warps, 255) if self.programs == 1 else None


LARGEST_ON_CHIP = 16384
"""Elements of a row that one program can keep in registers."""

# By the largest padded row they serve: the warps of a program that takes a whole row; the height and width of a
# tile, and its warps, where several programs share one.
_WHOLE_ROW = {256: 1, 512: 2, 1024: 4, 4096: 8, LARGEST_ON_CHIP: 16}
_TILE = {LARGEST_ON_CHIP: (16, 128, 4), 2**63: (32, 128, 8)}


def pad(elements: int) -> int:
    """The power of two that a row of `elements` is padded to."""
    return max(triton.next_power_of_2(elements), 128)


def whole_row(elements: int) -> Partition:
    """One program for each row, which has up to `LARGEST_ON_CHIP` elements."""
    padded = pad(elements)
    num_warps = next(warps for limit, warps in _WHOLE_ROW.items() if padded <= limit)
    return Partition(padded, padded // 128, 128, 1, num_warps)


def shared_row(elements: int) -> Partition:
    """Several programs for a row, as few rows would not occupy a GPU; one where it is small."""
    padded = pad(elements)
    if padded <= 4096:
        return whole_row(elements)
    height, width, num_warps = next(tile for limit, tile in _TILE.items() if padded <= limit)
    return Partition(padded, height, width, padded // (height * width), num_warps)


def blocks(elements: int) -> tuple[int, int, int]:
    """Block size, blocks of a row and warps of a kernel that works element by element."""
    block = min(pad(elements), 2048)
    return block, triton.cdiv(elements, block), max(1, block // 512)


@triton.jit
def tile_offsets(program, padded: tl.constexpr, height: tl.constexpr, width: tl.constexpr):
    """Offsets ``[height, width]`` within a row of the elements that one of its programs takes."""
    rows = tl.arange(0, height) * (padded // height)
    return rows[:, None] + (program * width + tl.arange(0, width))[None, :]


@triton.jit
def load_latents(latents, start, offsets, elements, full: tl.constexpr):
    """Elements of the row at ``start`` in float32, 0 beyond its end; ``full`` rows need no padding."""
    if full:
        values = tl.load(latents + start + offsets)
    else:
        values = tl.load(latents + start + offsets, mask=offsets < elements, other=0.0)
    return values.to(tl.float32)


@triton.jit
def store_latents(latents, start, offsets, elements, values, full: tl.constexpr):
    """Write elements of the row at ``start``, rounded to its dtype."""
    values = values.to(latents.dtype.element_ty)
    if full:
        tl.store(latents + start + offsets, values)
    else:
        tl.store(latents + start + offsets, values, mask=offsets < elements)


@triton.jit
def fold(values, size: tl.constexpr, to: tl.constexpr):
    """Add the second half to the first until ``to`` of ``size`` values are left.

    A sum of two numbers does not depend on their order, so neither the layout of a tensor in registers nor the
    number of warps can change a bit.
    """
    for i in tl.static_range(31):
        if (size >> i) > to:
            values = tl.sum(tl.reshape(values, (2, size >> (i + 1))), axis=0)
    return values


@triton.jit
def total(values, size: tl.constexpr):
    """The sum of ``size`` values, in the order of `fold`."""
    return tl.sum(fold(values, size, 1), axis=0)


@triton.jit
def fold_kernel(sources, results, columns, height: tl.constexpr, width: tl.constexpr):
    """``[N, height * columns]`` to ``[N, columns]``, ``width`` columns for each program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    offsets = tl.arange(0, height)[:, None] * columns + column[None, :]
    values = tl.load(sources + row * columns * height + offsets)
    tl.store(
        results + row * columns + column, fold(tl.reshape(values, (height * width,)), height * width, width)
    )


def shorten(partials: Tensor) -> Tensor:
    """Fold the partial sums ``[N, columns]`` of very long rows until one program can hold a row of them."""
    while partials.shape[1] > LARGEST_ON_CHIP:
        rows, columns = partials.shape[0], partials.shape[1] // 64
        folded = partials.new_empty(rows, columns)
        launch(
            fold_kernel, (rows, columns // 128), partials, folded, columns, height=64, width=128, num_warps=8
        )
        partials = folded
    return partials
