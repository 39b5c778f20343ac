"""Times a case in a new process that nobody told to keep freed memory, as a program that embeds the ops may be."""

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
    """Seconds of every round of a case in a process of its own.

    Args:
        case: on a CPU.
        budget: as of `benchmarks.timing.durations`.

    Raises:
        subprocess.CalledProcessError: the process failed; what it printed went to stderr.
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
    """Time what the arguments say, and print the seconds."""
    op, shape, rows, dtype, competitor, budget, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    inputs = Case(op, shape, int(rows), getattr(torch, dtype), competitor).inputs()
    torch.manual_seed(0)
    print(json.dumps(durations(runner(op, competitor), [inputs], device(), float(budget))))


if __name__ == "__main__":
    main()
