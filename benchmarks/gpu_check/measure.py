"""Measurements of one stage, each in a process of its own.

What breaks one, such as memory that runs out or a recording that fails, is not in the way of the next, and a process's
memory is that of its measurement. The next process imports its libraries while the one before it measures; it touches
the device only when its turn comes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from loopfast.config import Config

from .record import Record, first_line

_WORKER = "--worker"


class Work(NamedTuple):
    """What a measurement is given.

    Attributes:
        name: its own, which its lines are called.
        device: ``cuda`` or ``cpu``.
        small: whether the models are tiny.
        folder: for files that measurements share; removed at the end.
        record: where its figures go.
    """

    name: str
    device: torch.device
    small: bool
    folder: Path
    record: Record


class Measurement(NamedTuple):
    """One of a stage's measurements.

    Attributes:
        run: measures, in a process of its own.
        seconds: after which that process is ended.
        config: the configuration that it trains by, for which `loopfast plan` is asked; None: none.
        needed: whether those after it cannot do without it.
    """

    run: Callable[[Work], None]
    seconds: float = 60
    config: Callable[[Work], Config] | None = None
    needed: bool = False


def conduct(stage: str, measurements: Mapping[str, Measurement], arguments: Sequence[str]) -> int:
    """The main function of a stage that consists of measurements.

    Args:
        stage: its name, and that of its module.
        measurements: by name, in their order.
        arguments: of the command line: ``--device D [--small]``.

    Returns:
        The exit status: 1 where a measurement failed.
    """
    device = torch.device(arguments[arguments.index("--device") + 1] if "--device" in arguments else "cuda")
    record, small = Record.from_environment(stage), "--small" in arguments
    if _WORKER in arguments:
        folder = Path(arguments[arguments.index(_WORKER) + 1])
        name = sys.stdin.readline().strip()
        return _work(measurements[name], Work(name, device, small, folder, record)) if name else 0
    failed = False
    with tempfile.TemporaryDirectory(prefix=f"{stage}-") as folder:
        command = [sys.executable, "-m", f"benchmarks.gpu_check.{stage}", *arguments, _WORKER, folder]
        workers = _ahead(command, len(measurements))
        for name, measurement in measurements.items():
            worker = next(workers)
            work = Work(name, device, small, Path(folder), record)
            error = _wait(worker, measurement, work)
            if error is not None:
                failed = True
                record.write(name, error=error)
            if worker.returncode:
                failed = True
                if measurement.needed:
                    break
        workers.close()
    return int(failed)


def _ahead(command: Sequence[str], count: int) -> Iterable[subprocess.Popen[str]]:
    """Processes, each started while the one before it works; those that are not taken end by themselves."""
    # a worker waits for a name on its standard input, which closes with this process
    start = lambda: subprocess.Popen(command, stdin=subprocess.PIPE, text=True)  # noqa: E731
    waiting = start()
    try:
        for index in range(count):
            worker, waiting = waiting, (start() if index + 1 < count else None)
            yield worker
    finally:
        if waiting is not None:
            waiting.communicate("\n")


def _wait(worker: subprocess.Popen[str], measurement: Measurement, work: Work) -> str | None:
    """Let a worker measure; what to write of how it ended, if it could not do so itself."""
    assert worker.stdin is not None
    try:
        worker.stdin.write(f"{work.name}\n")
        worker.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already; its exit status is looked at below
    if measurement.config is not None:
        _plan(measurement.config, work)
    try:
        status = worker.wait(measurement.seconds)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return f"ended after its limit of {measurement.seconds:g} s"
    if status in (0, 1):
        return None
    return f"its process ended with {'signal' if status < 0 else 'exit status'} {abs(status)}"


def _plan(config: Callable[[Work], Config], work: Work) -> None:
    """What `loopfast plan` says that the measurement will hold; worked out beside it, on no device."""
    from loopfast.planning.architectures import load_architecture
    from loopfast.planning.memory import Resources, footprint

    try:
        planned = config(work)
        # 80 GiB of memory: the size has no part in what a run holds
        resources = Resources("cuda" if work.device.type == "cuda" else "cpu", 80 * 2**30)
        found = footprint(planned, load_architecture(planned.model), resources)
        work.record.write(work.name, planned_bytes=found.total, planned_peak=found.peak_phase)
    except Exception as error:
        work.record.write(work.name, error=f"the plan: {first_line(error)}")


def _work(measurement: Measurement, work: Work) -> int:
    """Measure, in this process."""
    try:
        measurement.run(work)
    except Exception as error:
        traceback.print_exc()
        work.record.write(work.name, error=first_line(error), **memory(work.device))
        return 1
    return 0


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process at their peak.

    Returns:
        ``allocated``: in tensors, at most; ``reserved``: by torch for them, at most; ``taken``: what is not free on the
        card now, contexts, libraries and graphs included. On a CPU only ``taken``, the most the process has held.
    """
    if device.type == "cpu":
        import resource

        return {"taken": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        return {"memory_error": first_line(error)}  # type: ignore[dict-item]
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "taken": total - free,
    }
