"""Makes stdout and stderr survive every character, closed pipe and full disk, and prints an error of a launch once.

It needs only the standard library, because the command line calls it first.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

__all__ = ["PRINTED_ERRORS", "REPLACE", "lost_output", "open_streams", "printed_by_another"]

PRINTED_ERRORS = "LOOPFAST_PRINTED_ERRORS"
"""The environment variable with the folder in which the processes of a launch record the errors they printed."""

REPLACE = "loopfast-replace"
"""The name of the codecs' error handler that replaces characters an encoding lacks by ASCII."""

_ASCII = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),  # hyphens, dashes and the minus sign
    **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
    **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),
    "±": "+/-",
    "×": "x",
    "÷": "/",
    "·": ".",
    "•": "*",
    "…": "...",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "√": "sqrt ",
    "∞": "inf",
    "²": "^2",
    "³": "^3",
    "α": "alpha",
    "β": "beta",
    "ε": "epsilon",
    "η": "eta",
    "μ": "mu",
    "µ": "u",
    "π": "pi",
    "σ": "sigma",
    "Σ": "Sigma",
}


def open_streams(*, keep_going: bool = False) -> None:
    """Makes ``sys.stdout`` and ``sys.stderr`` accept everything, whatever happens to the file or pipe behind them.

    Characters that the encoding lacks are written in ASCII. Output that a closed pipe or a full disk does not accept is
    dropped; see `lost_output`. A closed stream or file descriptor becomes the null device: without that, the next file
    that is opened, such as a checkpoint, would receive the output of libraries. Streams that are not the process's own,
    such as a notebook's, only get the replacements of characters.

    Args:
        keep_going: the process does more than print, so a warning on stderr reports dropped output at once.
    """
    _open_descriptors()
    sys.stdout = _steady(sys.stdout, sys.__stdout__, keep_going)
    sys.stderr = _steady(sys.stderr, sys.__stderr__)


def lost_output() -> str | None:
    """Returns why stdout dropped output; None if it did not, or if its reader closed the pipe."""
    if not isinstance(sys.stdout, _SteadyText):
        return None
    sys.stdout.flush()
    error = sys.stdout.file.failure
    return None if error is None or error.errno == errno.EPIPE else error.strerror


class _SteadyFile(io.FileIO):
    """A file that accepts everything, and drops what the file behind it does not accept.

    The attribute ``failure`` is the first error. Every write is tried, because a full disk may have space again.
    """

    def __init__(self, descriptor: int, name: str, keep_going: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = name
        self.failure: OSError | None = None
        self.keep_going = keep_going

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # a non-blocking pipe is full
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            first, self.failure = self.failure is None, self.failure or error
            if first and self.keep_going and error.errno != errno.EPIPE:
                print(
                    f"warning: cannot write to stdout: {error.strerror}; what is printed is lost, and the run goes on",
                    file=sys.stderr,
                    flush=True,
                )
        return size


class _SteadyText(io.TextIOWrapper):
    """Text over a steady file."""

    def __init__(self, file: _SteadyFile, old: io.TextIOWrapper) -> None:
        # without a buffer under python -u
        buffer: Any = file if old.write_through else io.BufferedWriter(file)
        super().__init__(
            buffer,
            encoding=old.encoding,
            errors=REPLACE,
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
        self.file = file


def _steady(stream: TextIO | None, original: TextIO | None, keep_going: bool = False) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if isinstance(stream, _SteadyText):
        stream.file.failure, stream.file.keep_going = None, keep_going
        return stream
    if stream is original and isinstance(stream, io.TextIOWrapper):
        with suppress(OSError):
            stream.flush()
        return _SteadyText(_SteadyFile(stream.fileno(), stream.name, keep_going), stream)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=REPLACE)
    return stream


def _open_descriptors() -> None:
    """Opens the null device in place of every closed descriptor of stdin, stdout and stderr."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # the system assigns the lowest free descriptor, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    shown = "".join(
        _ASCII.get(character) or character.encode("ascii", "backslashreplace").decode() for character in found
    )
    return shown, error.end


codecs.register_error(REPLACE, _replace)


def printed_by_another(text: str) -> bool:
    """Returns whether another process of the same ``loopfast launch`` has ended with this error and printed it."""
    folder = os.environ.get(PRINTED_ERRORS)
    if folder is None:
        return False
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # a second process may end because of the first one's error
    text = re.sub(r"^rank \d+ failed: ", "", text)
    try:
        Path(folder, f"{attempt}-{sha256(text.encode(errors='replace')).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # better printed twice than not at all
        pass
    return False
