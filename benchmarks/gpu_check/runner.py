"""Runs stages one after the other. Each has its time limit, and a failed stage does not affect the others."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from . import leash
from .record import Record

# A stage's process exits with this if it cannot run here, after it has written why.
SKIPPED = 77

# Less than this is not enough for any stage.
LEAST_SECONDS = 5.0

# The lengths that are kept of a stage's output: of its beginning, and of its end.
_HEAD_BYTES, _TAIL_BYTES = 512 * 2**10, 64 * 2**10

Outcome = str
"""``ok``, ``failed``, ``over its limit``, ``cut short``, ``skipped``, ``no time left`` or ``interrupted``."""

FAILURES = ("failed", "over its limit")


class Task(NamedTuple):
    """A stage as it runs on this machine.

    Attributes:
        name: the stage's name.
        seconds: its limit.
        command: the command to run.
        lacks: why it cannot run here; None if it can.
        environment: variables in addition to those of the check.
    """

    name: str
    seconds: float
    command: Sequence[str]
    lacks: str | None = None
    environment: Mapping[str, str] = MappingProxyType({})


class Result(NamedTuple):
    """The end of a stage; ``reason`` says why it did not run, or how it failed."""

    name: str
    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""


class _Log:
    """Writes a stage's output into the log: its beginning at once, and later its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._written, self._dropped, self._tail = file, 0, 0, bytearray()

    def write(self, data: bytes) -> None:
        head = data[: max(_HEAD_BYTES - self._written, 0)]
        self._file.write(head)
        self._file.flush()
        self._written += len(head)
        self._tail += data[len(head) :]
        if (excess := len(self._tail) - _TAIL_BYTES) > 0:
            self._dropped += excess
            del self._tail[:excess]

    def close(self) -> None:
        if self._dropped:
            self._file.write(f"\n[{self._dropped} bytes left out]\n".encode())
        self._file.write(bytes(self._tail) + b"\n")
        self._file.flush()


def run_all(
    tasks: Sequence[Task],
    limit: float,
    record: Callable[[str], Record],
    log_path: Path,
    folder: Path,
    say: Callable[[Result], None],
    began: float | None = None,
) -> list[Result]:
    """Runs stages in their order.

    A stage has its own limit, or the rest of the whole limit if that is less.

    Args:
        tasks: the stages.
        limit: seconds for all of them.
        record: makes the record for a stage's name.
        log_path: the file to which the stages' output is added.
        folder: the folder in which the stages run.
        say: called with each stage and its result when it has ended.
        began: reading of ``time.monotonic`` from which the limit counts; None is now.

    Returns:
        The end of each stage. After an interruption (Ctrl-C) the stages that have not run are missing.
    """
    deadline = (time.monotonic() if began is None else began) + limit
    results = []
    for task in tasks:
        left = deadline - time.monotonic()
        interrupted = False
        if task.lacks is not None:
            result = Result(task.name, "skipped", reason=task.lacks)
        elif left < LEAST_SECONDS:
            result = Result(task.name, "no time left", reason=f"the limit of {limit:g} s is used up")
        else:
            seconds = min(task.seconds, left)
            start = time.monotonic()
            status = _run(task, seconds, record(task.name), log_path, folder)
            interrupted = status is None
            result = _judged(task, status, time.monotonic() - start, seconds)
        record(task.name).write(
            "stage", outcome=result.outcome, seconds=round(result.seconds, 1), reason=result.reason
        )
        results.append(result)
        say(result)
        if interrupted:
            break
    return results


def _judged(task: Task, status: int | None, took: float, allowed: float) -> Result:
    if status is None:
        return Result(task.name, "interrupted", took)
    if status == leash.TIME_IS_UP and took >= allowed - 0.5:
        if allowed < task.seconds:
            return Result(task.name, "cut short", took, f"only {allowed:.0f} s were left of {task.seconds:g}")
        return Result(task.name, "over its limit", took, f"ended after {allowed:.0f} s")
    if status == SKIPPED:
        return Result(task.name, "skipped", took, "it cannot run here; see its line")
    if status:
        how = f"signal {status - 128}" if status > 128 else f"exit status {status}"
        return Result(task.name, "failed", took, how)
    return Result(task.name, "ok", took)


def _run(task: Task, seconds: float, record: Record, log_path: Path, folder: Path) -> int | None:
    """Runs a stage's command on a leash; returns its exit status, or None if Ctrl-C ended it."""
    theirs, ours = os.pipe()
    scratch = tempfile.mkdtemp(prefix=f"gpu-check-{task.name}-")
    command = (
        sys.executable,
        "-I",
        "-S",
        leash.__file__,
        str(theirs),
        f"{seconds:.2f}",
        scratch,
        *task.command,
    )
    interrupted = False
    with log_path.open("ab") as file:
        file.write(f"\n=== {task.name}: {' '.join(task.command)}\n".encode())
        log = _Log(file)
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **task.environment, **record.environment()},
            pass_fds=(theirs,),
            start_new_session=True,
        )
        os.close(theirs)
        try:
            _pump(process, log, time.monotonic() + seconds + 5 * leash.GRACE_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            os.close(ours)  # whatever still runs ends with this
            try:
                process.wait(5 * leash.GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
            assert process.stdout is not None
            process.stdout.close()
    return None if interrupted else process.returncode


def _pump(process: subprocess.Popen[bytes], log: _Log, deadline: float) -> None:
    """Copies the output until it ends; it may end later than the process, or never if a process has escaped."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if selector.select(0.1):
                data = os.read(process.stdout.fileno(), 2**16)
                if not data:
                    return
                log.write(data)
            elif process.poll() is not None:
                return
