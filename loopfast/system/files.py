"""Reads files of settings, and writes files so that no kill or full disk leaves half of one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopfast.errors import WriteError

LARGEST = 2**24
"""The size of the largest file of settings that is read, in bytes."""


def read_settings(path: Path, encoding: str) -> str:
    """Returns the text of a user's file of settings, up to a limit: a device such as ``/dev/zero`` has no end.

    Raises:
        OSError: the file cannot be read, or is larger than `LARGEST`.
        UnicodeDecodeError: the file has another encoding.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data.decode(encoding)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all, synced to the disk, and creates its folder.

    Raises:
        OSError: the disk is full or cannot be written. An earlier file of that name is unchanged.
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


def reason(error: Exception) -> str:
    """Returns the system's own words for an error, without the file; the error's text if it has none."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def writing(target: Path, what: str = "") -> Iterator[None]:
    """Context that turns an error of writing into a `WriteError` that names the folder or file.

    These are errors of the system, such as a full disk, and errors of safetensors, which writes weights.

    Args:
        target: the folder or file.
        what: what is written there, for the message, with a space after it.
    """
    try:
        yield
    except Exception as error:
        # by its name: safetensors comes with an extra
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise WriteError(f"cannot write {what}in {target}: {reason(error)}") from error
