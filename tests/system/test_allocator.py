from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Blocks of 48 MiB, freed and asked for again: each time new pages, unless freed memory is kept.
PROGRAM = """
import ctypes, json, os, resource
from loopfast.system.allocator import reuse_freed_memory
taken = reuse_freed_memory()
libc, size = ctypes.CDLL(None), 48 << 20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def block():
    pointer = libc.malloc(size)
    ctypes.memset(pointer, 1, size)
    libc.free(pointer)
block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    block()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"taken": taken, "faults": faults, "pages": os.environ["THP_MEM_ALLOC_ENABLE"]}))
"""


def run(**environment: str) -> dict[str, object]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "THP_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another allocator may be preloaded")
def test_freed_blocks_are_used_again() -> None:
    # 12,288 pages to a block
    kept, returned = run(), run(MALLOC_TRIM_THRESHOLD_="131072", THP_MEM_ALLOC_ENABLE="0")
    if not kept["taken"]:
        pytest.skip("this C library is not glibc")
    assert kept["faults"] < 1_000
    assert kept["pages"] == "1"
    assert returned == {"taken": False, "faults": returned["faults"], "pages": "0"}
    assert returned["faults"] > 10_000
