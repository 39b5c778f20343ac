"""A lock on a run's folder, so that one process at a time works in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopfast.errors import LoopfastError
from loopfast.system.files import writing

NAME = "lock.json"

# A process that was killed may hold its locks for a moment after its launcher has stopped waiting for it.
PATIENCE = 2.0
_POLL = 0.05

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}

_guard = threading.Lock()
_held: set[Path] = set()


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Context that excludes every other process, and every other run of this process, from a folder.

    It holds the kernel's lock on a file in the folder, which names the holder. The lock ends with the process, even if
    the process is killed. Reading the folder needs no lock.

    Args:
        folder: the run's folder. It is created if it does not exist, and removed at the end if it is still empty.
        warn: called with a line if the file system has no locks. The run continues without one.

    Raises:
        LoopfastError: another run has the lock, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / NAME
    # the kernel's lock belongs to the process: opening and closing its file a second time would release it
    with _guard:
        if path in _held:
            raise _in_use(folder, "another run of this process")
        _held.add(path)
    try:
        with writing(folder):
            descriptor = _acquired(path, folder, warn)
        try:
            yield
        finally:
            # while the lock is held: afterwards the file may belong to another process
            with suppress(OSError):
                if _is_file(descriptor, path):
                    path.unlink()
                for empty in made:
                    empty.rmdir()
            os.close(descriptor)
    finally:
        _held.discard(path)


def _acquired(path: Path, folder: Path, warn: Callable[[str], None]) -> int:
    """Locks the file, writes its holder into it, and returns its descriptor."""
    end = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the previous holder may just have removed the file that is locked now
            if _is_file(descriptor, path):
                break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > end:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise _in_use(folder, holder) from None
            time.sleep(_POLL)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warn(
                f"{folder} is on a file system without locks ({error.strerror}): nothing keeps a second process from "
                "training in it at the same time"
            )
            break
        os.close(descriptor)
    # the holder's name is only for the messages of other processes: on a full disk it may be missing
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return descriptor


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {content['pid']} on host {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _in_use(folder: Path, holder: str) -> LoopfastError:
    return LoopfastError(
        f"{folder} is in use by {holder}: wait until it has ended, or give this run another name (--set run.name=...)"
    )
