"""Holds a command and all that it starts: ``python leash.py FD SECONDS FOLDER COMMAND...``.

The command runs in its own session, with FOLDER for its temporary files. It is ended after SECONDS, or when the pipe FD
closes. The pipe closes when the process at its other end closes it or dies. All processes that the command leaves
behind are ended too, also those in other sessions, and FOLDER is removed.

The exit status is the command's, or 128 plus the signal's number if a signal ended it, or 124 if the time was up. The
program imports only what it needs, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TIME_IS_UP = 124
GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.05
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose own parents end; does nothing outside Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """Returns the ids of this process's children, or none if there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name, in parentheses, may hold spaces and parentheses itself
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(entry.parent.name))
    return found


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command's process group, first with SIGTERM, and then every remaining child."""
    _signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + GRACE_SECONDS
    # the children of a child that is killed become children of this process, and turn up in the next round
    while (left := children()) and time.monotonic() < deadline:
        for child in left:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def main(arguments: list[str]) -> int:
    """Runs a command and returns its exit status."""
    pipe, seconds, folder, command = int(arguments[0]), float(arguments[1]), arguments[2], arguments[3:]
    adopt_orphans()
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - as a text, for the environment
    deadline = time.monotonic() + seconds
    up = False
    try:
        try:
            process = subprocess.Popen(
                command,
                start_new_session=True,
                env={**os.environ, "TMPDIR": folder},
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
            return 127
        try:
            while process.poll() is None:
                if time.monotonic() >= deadline:
                    up = True
                    break
                closed, _, _ = select.select([pipe], [], [], _POLL_SECONDS)
                if closed:
                    break
        finally:
            end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if up:
        return TIME_IS_UP
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
