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

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Encrypt counters: the ten rounds of Philox4x32.

    Args:
        counter: four words, int64 tensors with values in ``[0, 2**32)``; they and the key broadcast together.
        key: two words of the same kind.

    Returns:
        Four words of the same kind, uniformly distributed over counters.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for round_index in range(ROUNDS):
        if round_index > 0:
            k0 = (k0 + _KEY_INCREMENTS[0]) & _WORD
            k1 = (k1 + _KEY_INCREMENTS[1]) & _WORD
        # The 64-bit products wrap around in int64. Their low words are right as they are; the shift that
        # leaves the high words copies the sign upward, which the mask takes off.
        product0 = x0 * _MULTIPLIERS[0]
        product1 = x2 * _MULTIPLIERS[1]
        x0 = ((product1 >> 32) ^ x1 ^ k0).bitwise_and_(_WORD)
        x2 = ((product0 >> 32) ^ x3 ^ k1).bitwise_and_(_WORD)
        x1 = product1.bitwise_and_(_WORD)
        x3 = product0.bitwise_and_(_WORD)
    return x0, x1, x2, x3


def _normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    # The uniform and the angle are words rounded to float32, then scaled: every IEEE machine gets the same bits.
    # What follows is exact up to the last rounding. The offset keeps the logarithm's argument in (0, 1].
    uniform = radius_word.to(torch.float32).mul_(2.0**-32).add_(2.0**-33).double()
    radius = uniform.log_().mul_(-2.0).sqrt_()
    angle = angle_word.to(torch.float32).mul_(2.0 * math.pi * 2.0**-32).double()
    return (radius * angle.cos()).to(torch.float32), (radius * angle.sin_()).to(torch.float32)


def philox_normal(seed: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise; the arguments are those of `loopfast_kernels.philox_normal`."""
    elements = math.prod(shape[1:])
    zero = seed.new_zeros(1, 1)
    block = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seed.device)[None, :]
    key = seed[:, None]
    words = philox_4x32((block, step[:, None] & _WORD, zero, zero), (key & _WORD, (key >> 32) & _WORD))
    noise = torch.stack((*_normal_pair(words[0], words[1]), *_normal_pair(words[2], words[3])), dim=-1)
    return noise.flatten(1)[:, :elements].reshape(*shape)
