"""Sets up the CPU's memory allocator for training, where every iteration allocates the same large blocks."""

from __future__ import annotations

import ctypes
import os

__all__ = ["reuse_freed_memory"]

# from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def reuse_freed_memory() -> bool:
    """Makes this process keep freed memory, and use huge pages for large blocks if the system has them.

    By default glibc returns blocks of some megabytes to the kernel. When they are allocated again, the kernel fills
    them with zeros page by page, which takes a tenth of a training step's time. Small pages cost another tenth.
    ``loopfast`` calls this function at its start; a program that embeds the trainer may call it before it imports
    torch. Peak memory stays the same, but memory is returned only at exit. Settings of the allocator in the
    environment are kept, and so is ``THP_MEM_ALLOC_ENABLE``, PyTorch's switch for huge pages.

    Returns:
        Whether the allocator accepted the settings. C libraries other than glibc have none.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name in os.environ for name in _SETTINGS):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # 1 is success
    return all(libc.mallopt(option, _NEVER) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
