"""Shared parts of the Triton kernels: launches, the partition of a row, sums in a fixed order."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a kernel on the device of the first tensor among its arguments, in that device's current stream.

    Triton also takes tuples of tensors and numbers, with or without names; the first tensor must not be in one.

    The compiler never fuses a multiplication and an addition: which pairs it would fuse differs from kernel to
    kernel, and a row's log-probability must have the same bits in all of them.
    """
    with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, Tensor))):
        kernel[grid](*arguments, **options, num_stages=1, enable_fp_fusion=False)


class Tile(NamedTuple):
    """The part of a row that one program takes; a kernel is compiled for each.

    A row is padded to a power of two and seen as a matrix of ``height`` rows, in row-major order. Each program takes
    ``width`` columns. `fold` adds the rows of that matrix first, so the sums within a program are part of the same
    sum however many programs share a row.

    Attributes:
        full: the row needs no padding.
    """

    padded: int
    height: int
    width: int
    full: bool


class Partition(NamedTuple):
    """The tile, number and warps of the programs that share a row."""

    tile: Tile
    programs: int
    num_warps: int

    @property
    def columns(self) -> int:
        """The number of partial sums that the programs of a row leave."""
        return self.tile.padded // self.tile.height

    @property
    def registers(self) -> int | None:
        """The limit of a thread's registers: all of them for a whole row, as ptxas sometimes spills below it."""
        return min(2048 // self.num_warps, 255) if self.programs == 1 else None


LARGEST_ON_CHIP = 16384
"""The number of elements of a row that one program can keep in registers."""

# Both tables go by the largest padded row they serve. The first has the warps of a program that takes a whole row, the
# second the height, width and warps of a tile where several programs share a row.
_WHOLE_ROW = {256: 1, 512: 2, 1024: 4, 4096: 8, LARGEST_ON_CHIP: 16}
_TILE = {LARGEST_ON_CHIP: (16, 128, 4), 2**63: (32, 128, 8)}


def pad(elements: int) -> int:
    """Returns the power of two that a row of `elements` is padded to."""
    return max(triton.next_power_of_2(elements), 128)


def whole_row(elements: int) -> Partition:
    """Returns one program for each row, which has up to `LARGEST_ON_CHIP` elements."""
    padded = pad(elements)
    num_warps = next(warps for limit, warps in _WHOLE_ROW.items() if padded <= limit)
    return Partition(Tile(padded, padded // 128, 128, elements == padded), 1, num_warps)


def shared_row(elements: int) -> Partition:
    """Returns several programs for a row, as few rows would not occupy a GPU; one program for a small row."""
    padded = pad(elements)
    if padded <= 4096:
        return whole_row(elements)
    height, width, num_warps = next(tile for limit, tile in _TILE.items() if padded <= limit)
    return Partition(Tile(padded, height, width, elements == padded), padded // (height * width), num_warps)


def blocks(elements: int) -> Partition:
    """Returns programs that each take a block of consecutive elements, for kernels without sums."""
    block = min(pad(elements), 2048)
    return Partition(
        Tile(block, 1, block, elements % block == 0), triton.cdiv(elements, block), max(1, block // 512)
    )


@triton.jit
def tile_offsets(program, TILE: tl.constexpr):
    """Returns the offsets ``[height, width]`` within a row of the elements that one of its programs takes."""
    rows = tl.arange(0, TILE.height) * (TILE.padded // TILE.height)
    return rows[:, None] + (program * TILE.width + tl.arange(0, TILE.width))[None, :]


@triton.jit
def load_latents(
    latents,  # [N, E]
    start,
    offsets,  # [height, width]
    elements,
    TILE: tl.constexpr,
):
    """Loads elements of the row at ``start`` as float32 ``[height, width]``, 0 beyond the row's end."""
    if TILE.full:
        values = tl.load(latents + start + offsets)
    else:
        values = tl.load(latents + start + offsets, mask=offsets < elements, other=0.0)
    return values.to(tl.float32)


@triton.jit
def store_latents(
    latents,  # [N, E]
    start,
    offsets,  # [height, width]
    elements,
    values,  # [height, width]
    TILE: tl.constexpr,
):
    """Stores elements of the row at ``start``, rounded to the latents' dtype."""
    values = values.to(latents.dtype.element_ty)
    if TILE.full:
        tl.store(latents + start + offsets, values)
    else:
        tl.store(latents + start + offsets, values, mask=offsets < elements)


@triton.jit
def fold(values, SIZE: tl.constexpr, TO: tl.constexpr):
    """Adds the second half to the first until ``TO`` of ``SIZE`` values are left.

    A sum of two numbers does not depend on their order, so neither the layout of a tensor in registers nor the
    number of warps can change a bit.
    """
    for i in tl.static_range(31):
        if (SIZE >> i) > TO:
            values = tl.sum(tl.reshape(values, (2, SIZE >> (i + 1))), axis=0)
    return values


@triton.jit
def total(values, SIZE: tl.constexpr):
    """Returns the sum of ``SIZE`` values, in the order of `fold`."""
    return tl.sum(fold(values, SIZE, 1), axis=0)


@triton.jit
def store_partials(
    partials,  # float32 [N, padded / height]
    row,
    program,
    values,  # [height, width]
    TILE: tl.constexpr,
):
    """Folds a tile to one sum a column and stores the sums."""
    columns = row * (TILE.padded // TILE.height) + program * TILE.width + tl.arange(0, TILE.width)
    size: tl.constexpr = TILE.height * TILE.width
    tl.store(partials + columns, fold(tl.reshape(values, (size,)), size, TILE.width))


@triton.jit
def fold_kernel(
    sources,  # float32 [N, HEIGHT * columns]
    results,  # float32 [N, columns]
    columns,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Folds ``WIDTH`` columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    offsets = tl.arange(0, HEIGHT)[:, None] * columns + column[None, :]
    values = tl.load(sources + row * columns * HEIGHT + offsets)
    tl.store(
        results + row * columns + column, fold(tl.reshape(values, (HEIGHT * WIDTH,)), HEIGHT * WIDTH, WIDTH)
    )


def shorten(partials: Tensor) -> Tensor:
    """Folds the partial sums ``[N, columns]`` of very long rows until one program can hold a row of them."""
    while partials.shape[1] > LARGEST_ON_CHIP:
        rows, columns = partials.shape[0], partials.shape[1] // 64
        folded = partials.new_empty(rows, columns)
        launch(
            fold_kernel, (rows, columns // 128), partials, folded, columns, HEIGHT=64, WIDTH=128, num_warps=8
        )
        partials = folded
    return partials
