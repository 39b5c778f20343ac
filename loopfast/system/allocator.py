"""The CPU's memory allocator, set for training: every iteration asks for the same large blocks again."""

from __future__ import annotations

import ctypes
import os

__all__ = ["reuse_freed_memory"]

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_THEIRS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def reuse_freed_memory() -> bool:
    """Keeps freed blocks in this process, and has large ones on huge pages, where the system offers that.

    By default glibc returns blocks of some megabytes to the kernel, which fills them with zeros page by page when they
    are asked for again: a tenth of a training step's time; small pages cost another tenth. ``loopfast`` calls this at
    its start; a program that embeds the trainer may do so before it imports torch. The most memory held at a time
    stays the same, but it is returned only at exit. An allocator that the environment has set up is left alone, and so
    is ``THP_MEM_ALLOC_ENABLE``, PyTorch's switch for huge pages.

    Returns:
        Whether the allocator took the settings; other C libraries have none of this kind.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name in os.environ for name in _THEIRS):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # 1 is success
    return all(libc.mallopt(option, _NEVER) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
