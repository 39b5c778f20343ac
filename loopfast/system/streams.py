"""Makes stdout and stderr streams that no character, closed pipe or full disk can fail, and says an error once.

Needs the standard library only, as the command line calls it first.
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

__all__ = ["REPLACE", "SAID", "lost_output", "open_streams", "said_by_another"]

SAID = "LOOPFAST_SAID"
"""The variable that names the folder in which the processes of a launch note the errors that they have said."""

REPLACE = "loopfast-replace"
"""Name of the codecs' error handler that writes what an encoding lacks in ASCII."""

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
    """Makes ``sys.stdout`` and ``sys.stderr`` write on whatever happens to what is behind them.

    Characters that the encoding lacks are written in ASCII. What a closed pipe or a full disk does not take is dropped;
    see `lost_output`. A stream that is closed, or its file descriptor, becomes the null device: otherwise the next file
    that is opened, such as a checkpoint, would get what libraries print. Streams that are not the process's own, such
    as a notebook's, only get the replacements.

    Args:
        keep_going: the process has more to do than to print: that its output is dropped is said at once, on stderr.
    """
    _open_descriptors()
    sys.stdout, sys.stderr = (
        _steady(sys.stdout, sys.__stdout__, keep_going),
        _steady(sys.stderr, sys.__stderr__),
    )


def lost_output() -> str | None:
    """Why stdout has not taken all that was printed; None where it has, or where its reader has closed the pipe."""
    if not isinstance(sys.stdout, _SteadyText):
        return None
    sys.stdout.flush()
    error = sys.stdout.file.failure
    return None if error is None or error.errno == errno.EPIPE else error.strerror


class _SteadyFile(io.FileIO):
    """A file that takes everything, and drops what the file behind it does not.

    It tries again each time, as a full disk may have room again.

    Attributes:
        failure: the first error.
        keep_going: see `open_streams`.
    """

    def __init__(self, descriptor: int, name: str, keep_going: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = name
        self.failure: OSError | None = None
        self.keep_going = keep_going

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None:  # a pipe that does not block is full
                    select.select([], [self], [])
                left = left[written or 0 :]
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
        # without a buffer where Python has none: python -u
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
    """Opens the null device for each of stdin, stdout and stderr that is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest number that is free is the one that is asked for
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


def said_by_another(text: str) -> bool:
    """Whether another process of the same ``loopfast launch`` has ended with this error, and has said it."""
    folder = os.environ.get(SAID)
    if folder is None:
        return False
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # one process may end with it, and another because of that
    text = re.sub(r"^rank \d+ failed: ", "", text)
    try:
        Path(folder, f"{attempt}-{sha256(text.encode(errors='replace')).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # said twice is better than not at all
        pass
    return False
