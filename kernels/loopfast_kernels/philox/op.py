"""Registration of ``loopfast::philox_normal``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..registration import Operator
from ..validation import check_tensor

_IMPLEMENTATIONS = backends.Implementations(__package__, "philox_normal")

_philox_normal = Operator(
    "philox_normal(Tensor seed, Tensor step, SymInt[] shape) -> Tensor",
    lambda arguments: _IMPLEMENTATIONS.choose(arguments.seed)(*arguments),
    lambda arguments: arguments.seed.new_empty(arguments.shape, dtype=torch.float32),
)


def philox_normal(seed: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns standard normal noise, a pure function of seed, step and element.

    Rows are independent: row ``i`` depends on ``seed[i]``, ``step[i]`` and `shape`'s number of elements per
    row, and its first elements do not change when the rows get longer.

    Args:
        seed: int64 ``[N]``, each row's 64-bit key.
        step: int64 ``[N]``, the second word of the counter, taken modulo 2**32.
        shape: ``(N, *L)``.

    Returns:
        float32 tensor of `shape` on the device of `seed`.

    Raises:
        TypeError: `seed` or `step` is not an int64 tensor.
        ValueError: their shapes or devices do not go together, or `shape` has no elements.
    """
    shape = tuple(shape)
    if len(shape) < 2 or shape[0] < 1 or math.prod(shape[1:]) < 1:
        raise ValueError(f"shape must be (N, ...) with elements in it, got {shape}")
    check_tensor("seed", seed, dtypes=(torch.int64,), shape=shape[:1])
    check_tensor("step", step, dtypes=(torch.int64,), shape=shape[:1])
    if step.device != seed.device:
        raise ValueError(f"step is on {step.device}, seed on {seed.device}")
    result: Tensor = _philox_normal(seed, step, shape)
    return result
