"""Sums over a row in an order that depends on the row's length alone."""

from __future__ import annotations

from torch import Tensor


def row_sum(values: Tensor) -> Tensor:
    """Sum every row by halving it again and again.

    `torch.sum` vectorizes differently for one row than for many, and splits a row among threads, so a row's
    last bits depend on its neighbors. Here the order is fixed: the row is folded to the largest power of two
    that fits, then its second half is added to its first until one element is left. The error grows with the
    logarithm of the length.

    Args:
        values: ``[N, E]``, ``E >= 1``.

    Returns:
        ``[N]`` of the same dtype.
    """
    length = values.shape[1]
    half = 1 << (length.bit_length() - 1)
    if half < length:
        folded = values[:, :half].clone()
        folded[:, : length - half] += values[:, half:]
        values = folded
    while half > 1:
        half //= 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0].clone()
