"""Normal noise on a GPU; the README of this folder defines it."""

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

# pi/2 in three parts. The first two have 22 bits, so that their products with 1 to 4 are exact.
_HALF_PI_HIGH = tl.constexpr(0x3243F6 * 2.0**-21)
_HALF_PI_MIDDLE = tl.constexpr(0x2A2216 * 2.0**-43)
_HALF_PI_LOW = tl.constexpr(6.223372171896613e-14)

# ln 2 in two parts; the first has 10 bits.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(math.log(2.0) - 0.693359375)


@triton.jit
def _radius(word):
    # The square root of -2 ln u. The library's logarithm branches for each element to catch infinities, which
    # u never is. Polynomial of Cephes (Moshier), on [sqrt(1/2), sqrt(2)).
    uniform = word.to(tl.float32) * _TO_UNIT + _HALF_STEP
    bits = uniform.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    square = x * x
    y = tl.fma(x, 7.0376836292e-2, -1.1514610310e-1)
    y = tl.fma(y, x, 1.1676998740e-1)
    y = tl.fma(y, x, -1.2420140846e-1)
    y = tl.fma(y, x, 1.4249322787e-1)
    y = tl.fma(y, x, -1.6668057665e-1)
    y = tl.fma(y, x, 2.0000714765e-1)
    y = tl.fma(y, x, -2.4999993993e-1)
    y = tl.fma(y, x, 3.3333331174e-1)
    y = y * x * square
    y = tl.fma(e, _LN2_LOW, y)
    y = tl.fma(square, -0.5, y)
    log = tl.fma(e, _LN2_HIGH, x + y)
    return tl.sqrt_rn(log * -2.0)


@triton.jit
def _cos_sin(word):
    # Angles lie in [0, 2 pi]: three subtractions reduce them exactly enough for 1 ulp near the zeros, and the
    # slow path for large angles that the library carries along (with an array in local memory) is not needed.
    # Polynomials of Cephes (Moshier), on [-pi/4, pi/4].
    angle = word.to(tl.float32) * _TO_ANGLE
    quadrant = (angle * (2.0 / 3.141592653589793) + 0.5).to(tl.int32)
    k = quadrant.to(tl.float32)
    x = angle - k * _HALF_PI_HIGH
    x = x - k * _HALF_PI_MIDDLE
    x = x - k * _HALF_PI_LOW
    square = x * x
    sine = tl.fma(square, -1.9515295891e-4, 8.3321608736e-3)
    sine = tl.fma(sine, square, -1.6666654611e-1)
    sine = tl.fma(sine * square, x, x)
    cosine = tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3)
    cosine = tl.fma(cosine, square, 4.166664568298827e-2)
    cosine = tl.fma(cosine * square, square, tl.fma(square, -0.5, 1.0))
    odd = (quadrant & 1) == 1
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) == 2, -first, first)
    second = tl.where((quadrant & 2) == 2, -second, second)
    return first, second


@triton.jit
def _four_normals(seed, step, block):
    zero = tl.zeros_like(block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), zero + step.to(tl.uint32), zero, zero, 10)
    cosine0, sine0 = _cos_sin(w1)
    radius0 = _radius(w0)
    cosine1, sine1 = _cos_sin(w3)
    radius1 = _radius(w2)
    return radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1


@triton.jit
def normal_noise(seed, step, counter, together: tl.constexpr):
    """Normals for groups of 4 or 8 elements.

    Args:
        seed: int64, the row's key.
        step: int64, the second word of the counter.
        counter: int32 ``[...]``, the groups: indices of elements divided by ``together``.
        together: 4 or 8.

    Returns:
        float32 ``[..., 2, 2]`` or ``[..., 2, 2, 2]``; flattened, the order of the elements.
    """
    if together == 8:
        z0, z1, z2, z3 = _four_normals(seed, step, counter * 2)
        z4, z5, z6, z7 = _four_normals(seed, step, counter * 2 + 1)
        z0, z1, z2, z3 = tl.join(z0, z4), tl.join(z1, z5), tl.join(z2, z6), tl.join(z3, z7)
    else:
        z0, z1, z2, z3 = _four_normals(seed, step, counter)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def philox_normal_kernel(noise, seed, step, elements, block: tl.constexpr):
    """Write a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * block
    counter = start // 4 + tl.arange(0, block // 4)
    values = normal_noise(tl.load(seed + row), tl.load(step + row), counter, 4)
    offsets = start + tl.arange(0, block)
    tl.store(noise + row * elements + offsets, tl.reshape(values, (block,)), mask=offsets < elements)


def philox_normal(seed: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise of `shape`; the arguments are those of `loopfast_kernels.philox_normal`."""
    noise = torch.empty(tuple(shape), dtype=torch.float32, device=seed.device)
    elements = math.prod(shape[1:])
    block, count, num_warps = blocks(elements)
    grid = (shape[0], count)
    launch(philox_normal_kernel, grid, noise, seed, step, elements, block=block, num_warps=num_warps)
    return noise
