"""Reading files of settings, and writing files so that a kill or a full disk leaves no half of one behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopfast.errors import WriteError

LARGEST = 2**24
"""Bytes of the largest file of settings that is read."""


def read_settings(path: Path, encoding: str) -> str:
    """The text of a user's file of settings. A device such as ``/dev/zero`` has no end, so there is a limit.

    Raises:
        OSError: it cannot be read, or is larger than `LARGEST`.
        UnicodeDecodeError: it has another encoding.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data.decode(encoding)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, synced to the disk, so that it is there whole or not at all; and the folder it is in.

    Raises:
        OSError: the disk is full or cannot be written; a file that was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Makes a disk that is full or cannot be written a `WriteError` that names the folder or file.

    Errors of the libraries that write weights count too, whatever their class.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif type(error).__name__ == "SafetensorError":  # safetensors comes with an extra
            reason = str(error)
        else:
            raise
        raise WriteError(f"cannot write in {target}: {reason}") from error
