"""Sums over a row, in an order that depends on nothing but the row's length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 64
BLOCK = 4096


def row_sum(values: Tensor) -> Tensor:
    """Sums every row in the order of the native library.

    `torch.sum` vectorizes differently for one row than for many, and splits a row among threads, so a row's
    last bits depend on its neighbors. Here a row is cut into blocks of 4096 elements. A block's element i is added
    to lane i mod 64. The 64 lanes are folded: the second half is added to the first until one lane is left. The
    blocks' sums are added up in float64.

    Args:
        values: ``[N, E]``, ``E >= 1``.

    Returns:
        float64 ``[N]``, not rounded to the dtype of `values`.
    """
    length = values.shape[1]
    # A short row needs no whole block: the missing elements would only add zeros.
    depth = min(BLOCK // LANES, -(-length // LANES))
    lanes = pad(values, (0, -length % (depth * LANES))).unflatten(1, (-1, depth, LANES))
    blocks = lanes[:, :, 0]
    for index in range(1, depth):
        blocks = blocks + lanes[:, :, index]
    half = LANES // 2
    while half:
        blocks = blocks[..., :half] + blocks[..., half:]
        half //= 2
    total = torch.zeros(values.shape[0], dtype=torch.float64, device=values.device)
    for block in blocks[..., 0].unbind(1):
        total = total + block.double()
    return total
