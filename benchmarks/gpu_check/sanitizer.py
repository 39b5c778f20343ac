"""Some tests of the ops under compute-sanitizer's memcheck: accesses outside of tensors, and misaligned ones."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from .programs import run_and_show
from .record import Record
from .stages import pytest_command

# Every op, forward and backward, in three types; and the shape whose rows end within a block.
SELECTION = ("tests/kernels/test_gpu.py", "-k", "results_are_those or (exactly_one and shape4)")


def command() -> Sequence[str]:
    """Returns the command to run."""
    return (
        *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
        *(sys.executable, *pytest_command(*SELECTION, timeout=60)),
    )


def main() -> int:
    """Runs the tests, and writes the number of errors."""
    # torch keeps tensors side by side in large blocks, in which an access outside of a tensor is not detected
    status, output = run_and_show(command(), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    found = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    record = Record.from_environment("sanitizer")
    if not found:
        said = [line for line in output.splitlines() if "=========" in line]
        record.write("memcheck", error=(said or ["compute-sanitizer gave no summary"])[-1].strip()[:300])
        return 1
    first = [line.strip("= \n") for line in output.splitlines() if "Invalid" in line or "Misaligned" in line]
    record.write("memcheck", errors=int(found[-1]), first=first[:3])
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
