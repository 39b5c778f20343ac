"""Turns Ctrl-C, SIGTERM and SIGHUP into a request that the run answers between two updates."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGHUP is only noted, and a second one ends the process as usual.

    A closed terminal may send SIGHUP several times, so a second SIGHUP is ignored. Where SIGHUP was ignored before, as
    under ``nohup``, it stays so.

    Outside the main thread, where Python takes no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 129 after SIGHUP, 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self._received or signal.SIGINT)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        hangup = self._previous.pop(signal.SIGHUP, None)
        self._restore()
        if hangup is not None:
            self._previous = {signal.SIGHUP: hangup}
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
