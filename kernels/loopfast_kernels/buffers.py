"""Memory for large results on the CPU, used again once a result is gone.

glibc returns freed blocks of this size to the system, which zeroes their pages one by one when the process asks for
them again. For a gradient this takes longer than its computation. So some blocks are kept. Each is lent through an
object that the result's storage holds, and a weak reference to this object tells when the block is free: when the last
tensor, view or graph with that storage is gone. No code runs when a result is freed, in no thread and not at exit.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_char

import torch
from torch import Tensor
from torch.utils import deterministic

SMALLEST = 128 * 2**10
"""The bytes from which a result lives in a block; the memory of smaller ones glibc's heap reuses by itself."""

MOST_BYTES = 128 * 2**20
"""The limit of all blocks' bytes, free and lent: both gradients of 64 rows of 16×128×128 in float32."""

MOST_BLOCKS = 64
"""The limit of the number of blocks, which a search goes through one by one."""


class _Block:
    """Memory, and the weak reference to the object it was last lent through."""

    __slots__ = ("array", "loan", "size")

    def __init__(self, size: int) -> None:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.size = size
        self.array = (c_char * size).from_address(memory.data_ptr())
        self.array.memory = memory  # type: ignore[attr-defined] # a loan keeps the array, the array the memory
        self.loan: Callable[[], object] = lambda: None


# The blocks, in the order of their last loans. Every change of the list is one step, so threads need no lock: a fork
# could leave a lock held, and a finalizer could wait for it.
_blocks: list[_Block] = []


def _take(size: int) -> _Block | None:
    """Takes the free block of a size that was lent last out of the list; None if there is none."""
    for block in reversed(_blocks):
        if block.size == size and block.loan() is None:
            try:
                _blocks.remove(block)
            except ValueError:
                continue  # another thread was faster
            if block.loan() is None:
                return block
            _blocks.append(block)  # another thread was faster, and has lent it by now
    return None


def _flat(count: int, dtype: torch.dtype) -> Tensor | None:
    """Returns elements in a block, or None where torch allocates them: too few, too many, or filled with NaN."""
    size = count * dtype.itemsize
    if not SMALLEST <= size <= MOST_BYTES:
        return None
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        return None
    taken = _take(size)
    block = _Block(size) if taken is None else taken
    loan = memoryview(block.array)
    block.loan = weakref.ref(loan)
    _blocks.append(block)
    if taken is None:
        while len(_blocks) > MOST_BLOCKS or sum(block.size for block in _blocks) > MOST_BYTES:
            del _blocks[:1]
    return torch.frombuffer(loan, dtype=dtype)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Does what ``torch.empty`` does on the CPU; the storage of a large result cannot grow, like a NumPy array's."""
    flat = _flat(math.prod(shape), dtype)
    return torch.empty(shape, dtype=dtype, device="cpu") if flat is None else flat.resize_(*shape)


def empty_like(tensor: Tensor) -> Tensor:
    """Does what ``torch.empty_like`` does on the CPU, for a tensor that is contiguous or channels last; see `empty`."""
    flat = _flat(tensor.numel(), tensor.dtype)
    if flat is None:
        return torch.empty_like(tensor)
    return flat.resize_as_(tensor, memory_format=torch.preserve_format)


def clear() -> None:
    """Releases the free blocks now, and lent ones with their results."""
    _blocks.clear()
