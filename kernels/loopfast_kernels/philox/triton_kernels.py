"""Normal noise on a GPU; the README of this folder defines it.

Every operation is IEEE arithmetic and rounds once, in the order of the native library's ``numeric.h``, so both give
the same bits.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import blocks, launch

_TO_UNIT = tl.constexpr(2.0**-32)
_HALF_STEP = tl.constexpr(2.0**-33)
_TO_ANGLE = tl.constexpr(2.0 * math.pi * 2.0**-32)
_HALF_PI_HIGH = tl.constexpr(0x3243F6 * 2.0**-21)
_HALF_PI_MIDDLE = tl.constexpr(0x2A2216 * 2.0**-43)


@triton.jit
def _log_of_uniform(uniform):
    # x = 2^e (1 + f) with f in [-0.29, 0.41], and a polynomial in f with the coefficients of Moshier's Cephes library.
    # The GPU library's logarithm would branch for each element, to catch values that a uniform number never has.
    offset = uniform.to(tl.int32, bitcast=True) - 0x3F3504F3
    f = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    e = (offset >> 23).to(tl.float32)
    square = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    # ln 2 has two parts, the first with few enough bits for an exact product. The rounding error of its sum with f is
    # added to the small terms.
    product = e * 0.693359375
    high = product + f
    lost = (product - high) + f
    return high + (lost + (f * square * p + e * -2.12194440e-4 - square * 0.5))


@triton.jit
def _cosine_and_sine(angle):
    # The angle, in [0, 2 pi], less the nearest multiple of pi/2 is x + tail; the polynomials are those of Cephes. The
    # GPU library's functions would bring a slow path for large angles, with an array in local memory.
    quadrant = (angle * 0.636619772 + 0.5).to(tl.int32)
    q = quadrant.to(tl.float32)
    # pi/2 has three parts. The first two have 22 bits: their products with q <= 4 are exact, and so is the difference.
    difference = angle - q * _HALF_PI_HIGH
    middle = q * _HALF_PI_MIDDLE
    x = difference - middle
    tail = ((difference - x) - middle) - q * 6.223372e-14
    square = x * x
    p = (square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = x + (p * square * x + tail)
    r = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    half = square * 0.5
    rest = 1.0 - half
    cosine = rest + (((1.0 - rest) - half) + (r * (square * square) - x * tail))
    swapped = (quadrant & 1) != 0
    first = tl.where(swapped, sine, cosine)
    second = tl.where(swapped, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    return first, tl.where((quadrant & 2) != 0, -second, second)


@triton.jit
def _normal_pair(radius_word, angle_word):
    uniform = radius_word.to(tl.float32) * _TO_UNIT + _HALF_STEP
    radius = tl.sqrt_rn(_log_of_uniform(uniform) * -2.0)
    cosine, sine = _cosine_and_sine(angle_word.to(tl.float32) * _TO_ANGLE)
    return radius * cosine, radius * sine


@triton.jit
def _four_normals(seed, step, block):
    zero = tl.zeros_like(block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), zero + step.to(tl.uint32), zero, zero, 10)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_noise(seed, step, counter, TOGETHER: tl.constexpr):
    """Returns normals for groups of 4 or 8 elements.

    Args:
        seed: int64, the row's key.
        step: int64, the second word of the counter.
        counter: int32 ``[...]``, the groups: indices of elements divided by ``TOGETHER``.
        TOGETHER: 4 or 8.

    Returns:
        float32 ``[..., 2, 2]`` or ``[..., 2, 2, 2]``; flattened, they are in the order of the elements.
    """
    if TOGETHER == 8:
        z0, z1, z2, z3 = _four_normals(seed, step, counter * 2)
        z4, z5, z6, z7 = _four_normals(seed, step, counter * 2 + 1)
        z0, z1, z2, z3 = tl.join(z0, z4), tl.join(z1, z5), tl.join(z2, z6), tl.join(z3, z7)
    else:
        z0, z1, z2, z3 = _four_normals(seed, step, counter)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def philox_normal_kernel(
    noise,  # float32 [N, E]
    seed,  # int64 [N]
    step,  # int64 [N]
    elements,
    BLOCK: tl.constexpr,
):
    """Writes the noise of a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    values = normal_noise(tl.load(seed + row), tl.load(step + row), counter, 4)
    offsets = start + tl.arange(0, BLOCK)
    tl.store(noise + row * elements + offsets, tl.reshape(values, (BLOCK,)), mask=offsets < elements)


def philox_normal(seed: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns noise of `shape`; the arguments are those of `loopfast_kernels.philox_normal`."""
    noise = torch.empty(tuple(shape), dtype=torch.float32, device=seed.device)
    elements = math.prod(shape[1:])
    tile, programs, num_warps = blocks(elements)
    grid = (shape[0], programs)
    launch(philox_normal_kernel, grid, noise, seed, step, elements, BLOCK=tile.width, num_warps=num_warps)
    return noise
