"""One process at a time works in a run's folder."""

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

# A process that was killed may hold its locks a moment longer than its launcher waits for it.
PATIENCE = 2.0
_POLL = 0.05

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}

_guard = threading.Lock()
_held: set[Path] = set()


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Context in which no other process, and no other run of this one, can enter the same for a folder.

    The lock is the kernel's, on a file in the folder that names its holder. It ends with the process, whatever ends it.
    Reading the folder needs no lock.

    Args:
        folder: of the run. It is made if need be, and removed at the end if it is still empty.
        warn: called with a line where the file system has no locks. The run goes on without one.

    Raises:
        LoopfastError: another run has the lock, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / NAME
    # the kernel's lock is the process's: to open and close its file a second time would end it
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
            # before the lock ends: later the file may be another process's
            with suppress(OSError):
                if _is_file(descriptor, path):
                    path.unlink()
                for empty in made:
                    empty.rmdir()
            os.close(descriptor)
    finally:
        _held.discard(path)


def _acquired(path: Path, folder: Path, warn: Callable[[str], None]) -> int:
    """The descriptor of the file, once it is locked and says whose it is."""
    end = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who had it before may just have removed the file that is locked now
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
    # the lock counts; whose it is, is only for others' messages, and may be missing on a full disk
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
