"""Philox4x32-10 in torch's integer arithmetic, and normal noise from it.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

_SQRT_HALF = 0x3F3504F3  # its bits
_HALF_PI = (0x3243F6 * 2.0**-21, 0x2A2216 * 2.0**-43, 6.223372e-14)
_LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Encrypts counters in the ten rounds of Philox4x32.

    Args:
        counter: four words: int64 tensors with values in ``[0, 2**32)``, which broadcast with the key.
        key: two such words.

    Returns:
        Four such words, uniformly distributed over counters.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for round_index in range(ROUNDS):
        if round_index > 0:
            k0 = (k0 + _KEY_INCREMENTS[0]) & _WORD
            k1 = (k1 + _KEY_INCREMENTS[1]) & _WORD
        # The 64-bit products wrap around in int64. Their low words are right; the shift that leaves the high words
        # copies the sign into the upper half, and the mask removes it.
        product0 = x0 * _MULTIPLIERS[0]
        product1 = x2 * _MULTIPLIERS[1]
        x0 = ((product1 >> 32) ^ x1 ^ k0).bitwise_and_(_WORD)
        x2 = ((product0 >> 32) ^ x3 ^ k1).bitwise_and_(_WORD)
        x1 = product1.bitwise_and_(_WORD)
        x3 = product0.bitwise_and_(_WORD)
    return x0, x1, x2, x3


def _log_of_uniform(x: Tensor) -> Tensor:
    """Returns ``ln x`` for float32 in ``[2**-33, 1]``: ``x = 2**e (1 + f)``, and Cephes' polynomial in f (logf)."""
    offset = x.view(torch.int32) - _SQRT_HALF
    exponent = (offset >> 23).to(torch.float32)
    f = ((offset & 0x007FFFFF) + _SQRT_HALF).view(torch.float32) - 1.0
    square = f * f
    polynomial = torch.full_like(f, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        polynomial = polynomial * f + coefficient
    # ln 2 has two parts, the first with few enough bits for an exact product. The rounding error of its sum with f is
    # added to the small terms.
    product = exponent * 0.693359375
    high = product + f
    lost = (product - high) + f
    return high + (lost + (f * square * polynomial + exponent * -2.12194440e-4 - 0.5 * square))


def _sine_and_cosine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both for float32 in ``[0, 2 pi]``: Cephes' polynomials of the angle less the nearest multiple of pi/2."""
    quadrant = (angle * 0.636619772 + 0.5).to(torch.int32)
    q = quadrant.to(torch.float32)
    # pi/2 has three parts. The first two have 22 bits: their products with q <= 4 are exact.
    difference = angle - q * _HALF_PI[0]
    middle = q * _HALF_PI[1]
    x = difference - middle
    tail = ((difference - x) - middle) - q * _HALF_PI[2]
    square = x * x
    p = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = x + (p * square * x + tail)
    r = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    half = 0.5 * square
    rest = 1.0 - half
    cosine = rest + (((1.0 - rest) - half) + (r * (square * square) - x * tail))
    swapped = (quadrant & 1) == 1
    sine, cosine = torch.where(swapped, cosine, sine), torch.where(swapped, sine, cosine)
    return (
        torch.where((quadrant & 2) == 2, -sine, sine),
        torch.where(((quadrant + 1) & 2) == 2, -cosine, cosine),
    )


def _normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    # These are operations of IEEE float32 that round once, in a fixed order: every machine and backend gets the same
    # bits. The offset keeps the logarithm's argument in (0, 1].
    uniform = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
    # torch's square root of float32 is not always the nearest float32; that of float64, rounded, is.
    radius = (_log_of_uniform(uniform) * -2.0).double().sqrt().to(torch.float32)
    sine, cosine = _sine_and_cosine(angle_word.to(torch.float32) * (2.0 * math.pi * 2.0**-32))
    return radius * cosine, radius * sine


def philox_normal(seed: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns standard normal noise; the arguments are those of `loopfast_kernels.philox_normal`."""
    elements = math.prod(shape[1:])
    zero = seed.new_zeros(1, 1)
    block = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seed.device)[None, :]
    key = seed[:, None]
    words = philox_4x32((block, step[:, None] & _WORD, zero, zero), (key & _WORD, (key >> 32) & _WORD))
    noise = torch.stack((*_normal_pair(words[0], words[1]), *_normal_pair(words[2], words[3])), dim=-1)
    return noise.flatten(1)[:, :elements].reshape(*shape)
