"""Philox noise from the native library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buffers import empty
from ..native_library import call, pointer


def philox_normal(seed: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns float32 noise of `shape`, as `reference` does."""
    noise = empty(shape, torch.float32)
    rows = shape[0]
    call(
        "loopfast_philox_normal",
        rows,
        noise.numel() // rows,
        pointer("seed", seed),
        pointer("step", step),
        noise.data_ptr(),
        torch.get_num_threads(),
    )
    return noise
