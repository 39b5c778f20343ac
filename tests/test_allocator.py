from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Blocks of 48 MiB, freed and asked for again: each time new pages, unless freed memory is kept.
PROGRAM = """
import json, os, resource
from loopfast.allocator import reuse_freed_memory
taken = reuse_freed_memory()
import torch
def block():
    torch.empty(12 << 20).fill_(1)
for _ in range(5):
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
    # small pages, so that they can be counted: 12,288 to a block
    kept, returned = (
        run(THP_MEM_ALLOC_ENABLE="0"),
        run(THP_MEM_ALLOC_ENABLE="0", MALLOC_TRIM_THRESHOLD_="131072"),
    )
    if not kept["taken"]:
        pytest.skip("this C library is not glibc")
    assert kept["faults"] < 2_000
    assert returned == {"taken": False, "faults": returned["faults"], "pages": "0"}
    assert returned["faults"] > 10_000


def test_huge_pages_are_asked_for() -> None:
    assert run()["pages"] == "1"
