"""Times a case in a new process that is not configured to keep freed memory, like programs that embed the ops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .cases import Case, device
from .competitors import runner
from .timing import durations

_ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES")


def seconds_elsewhere(case: Case, budget: float) -> list[float]:
    """Returns the seconds of every round of a case, measured in a separate process.

    Args:
        case: a case on a CPU.
        budget: the same as in `benchmarks.timing.durations`.

    Raises:
        subprocess.CalledProcessError: the process failed; its output went to stderr.
    """
    arguments = (case.op, case.shape, str(case.rows), str(case.dtype).removeprefix("torch."), case.competitor)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_ALLOCATOR)}
    process = subprocess.run(
        [sys.executable, "-m", __name__, *arguments, str(budget), str(torch.get_num_threads())],
        cwd=Path(__file__).parents[1],
        env=clean,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds: list[float] = json.loads(process.stdout)
    return seconds


def main() -> None:
    """Times the case of the arguments, and prints the seconds."""
    op, shape, rows, dtype, competitor, budget, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    inputs = Case(op, shape, int(rows), getattr(torch, dtype), competitor).inputs()
    torch.manual_seed(0)
    print(json.dumps(durations(runner(op, competitor), [inputs], device(), float(budget))))


if __name__ == "__main__":
    main()
