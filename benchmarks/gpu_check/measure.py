"""Measurements of one stage, each in its own process.

So a measurement that fails, for example because memory runs out or a recording fails, does not disturb the next one,
and a process's memory is that of its measurement. The next process imports its libraries while the previous one
measures; it uses the device only when its turn comes.

    python -m benchmarks.gpu_check.measure sd15 --device cuda [--small]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .record import Record, first_line
from .stages import patience

if TYPE_CHECKING:
    from loopfast.config import Config


_PROGRAM = ("-m", "benchmarks.gpu_check.measure")


class Work(NamedTuple):
    """The inputs of a measurement.

    Attributes:
        name: the measurement's name, which its lines have.
        device: ``cuda`` or ``cpu``.
        small: whether the models are tiny.
        folder: for files that measurements share; removed at the end.
        record: receives its figures.
    """

    name: str
    device: str
    small: bool
    folder: Path
    record: Record


class Measurement(NamedTuple):
    """One of a stage's measurements.

    Attributes:
        run: measures, in its own process.
        seconds: the time limit of that process.
        config: makes the configuration of its training, which is passed to `loopfast plan`; None if it does not train.
        needed: whether the later measurements depend on it.
        small: whether it also runs with tiny models.
    """

    run: Callable[[Work], None]
    seconds: float = 60
    config: Callable[[Work], Config] | None = None
    needed: bool = False
    small: bool = True


def main(arguments: Sequence[str]) -> int:
    """Runs the measurements of a stage, or is one of its workers.

    Args:
        arguments: the stage's name, which is that of its module, and ``--device D [--small]``.

    Returns:
        The exit status: 1 if a measurement failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.measure", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    record = Record.from_environment(options.stage)
    if options.worker is not None:
        measurements = _measurements(options.stage)
        name = sys.stdin.readline().strip()
        if not name:
            return 0
        return _work(measurements[name], Work(name, options.device, options.small, options.worker, record))
    with tempfile.TemporaryDirectory(prefix=f"{options.stage}-") as folder:
        command = [sys.executable, *_PROGRAM, *arguments, "--worker", folder]
        first = _start(command)  # it imports its libraries while this process does
        measurements = _measurements(options.stage)
        if options.small:
            measurements = {name: one for name, one in measurements.items() if one.small}
        work = Work("", options.device, options.small, Path(folder), record)
        return conduct(measurements, work, command, first)


def conduct(
    measurements: Mapping[str, Measurement], work: Work, command: Sequence[str], first: subprocess.Popen[str]
) -> int:
    """Lets workers measure, one after the other.

    Args:
        measurements: by name, in their order.
        work: the inputs of each measurement, without its name.
        command: starts a worker.
        first: the first worker.

    Returns:
        1 if a measurement failed, else 0.
    """
    failed, waiting, left = False, first, len(measurements)
    for name, measurement in measurements.items():
        worker, left = waiting, left - 1
        if left:
            waiting = _start(command)
        error = _wait(worker, measurement, work._replace(name=name))
        if error is not None:
            work.record.write(name, error=error)
        if worker.returncode or error is not None:
            failed = True
            if measurement.needed:
                break
    if waiting.poll() is None:
        waiting.communicate("\n")
    return int(failed)


def _measurements(stage: str) -> Mapping[str, Measurement]:
    found: Mapping[str, Measurement] = importlib.import_module(f".{stage}", __package__).MEASUREMENTS
    return found


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a worker. It waits for a name on its standard input, which closes when this process ends."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)


def _wait(worker: subprocess.Popen[str], measurement: Measurement, work: Work) -> str | None:
    """Lets a worker measure, and returns what to record of its end if it could not do so itself."""
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already; its exit status is checked below
        worker.stdin.write(f"{work.name}\n")
        worker.stdin.close()
    if measurement.config is not None:
        _plan(measurement.config, work)
    limit = measurement.seconds * patience(work.device)
    try:
        status = worker.wait(limit)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return f"ended after its limit of {limit:g} s"
    if status in (0, 1):
        return None
    return f"its process ended with {'signal' if status < 0 else 'exit status'} {abs(status)}"


def _plan(config: Callable[[Work], Config], work: Work) -> None:
    """Records the plan's estimate of the measurement's memory; it is computed during the measurement, on no device."""
    from loopfast.planning.architectures import load_architecture
    from loopfast.planning.memory import Resources, footprint

    try:
        planned = config(work)
        # 80 GiB of memory: the bytes of a run do not depend on it
        resources = Resources("cuda" if work.device == "cuda" else "cpu", 80 * 2**30)
        found = footprint(planned, load_architecture(planned.model), resources)
        work.record.write(work.name, planned_bytes=found.total, planned_peak=found.peak_phase)
    except Exception as error:
        work.record.write(work.name, error=f"the plan: {first_line(error)}")


def _work(measurement: Measurement, work: Work) -> int:
    """Measures, in this process."""
    try:
        measurement.run(work)
    except Exception as error:
        traceback.print_exc()
        work.record.write(work.name, error=first_line(error), **memory(work.device))
        return 1
    return 0


def memory(device: str) -> dict[str, Any]:
    """Returns bytes of this process at their peak.

    Returns:
        ``allocated``: the most in tensors; ``reserved``: the most that torch has reserved for them; ``taken``: all
        memory of the card that is not free now, contexts, libraries and graphs included. On a CPU only ``taken``, the
        most that the process has held.
    """
    if device == "cpu":
        import resource

        return {"taken": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        return {"memory_error": first_line(error)}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "taken": total - free,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
