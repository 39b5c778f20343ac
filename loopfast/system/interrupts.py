"""Turns Ctrl-C, SIGTERM and SIGHUP into a request that the run obeys between two updates."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any


class StopRequest:
    """Context that only records the first SIGINT, SIGTERM or SIGHUP. A second signal ends the process as usual.

    A closed terminal may send SIGHUP several times, so a second SIGHUP is ignored. If SIGHUP was ignored before, as
    under ``nohup``, it remains ignored.

    Outside the main thread Python accepts no signal handlers, and the context records nothing.

    Args:
        grace: seconds after the first signal during which others are ignored. Ctrl-C in a terminal reaches a launcher
            and its processes, and the launcher then sends it to the processes again.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self._grace = grace
        self._ignored_until = 0.0
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True if a signal has arrived."""
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

    def __exit__(self, *error: object) -> None:
        self._restore(*list(self._previous))

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._ignored_until = number, now + self._grace
            if self._grace == 0:
                # the system's own handlers act at once; Python's only between two of its instructions
                self._restore(signal.SIGINT, signal.SIGTERM)
        elif number != signal.SIGHUP and now > self._ignored_until:
            self._restore(signal.SIGINT, signal.SIGTERM)
            os.kill(os.getpid(), number)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))
