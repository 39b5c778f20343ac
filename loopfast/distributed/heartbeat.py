"""Notices when a process of the group dies or hangs, says which, and ends those that would wait for it forever."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from loopfast.errors import first_line

BEAT = 2.0
"""Seconds between two signs of life."""

SILENCE = 30.0
"""Seconds without a sign of life after which a process counts as dead."""

GRACE = 10.0
"""Seconds that a process has, once another is known to be dead, to end by itself."""


class Watch:
    """A thread that gives signs of life to the group's store and reads the others' there.

    The first process reads everybody's and publishes its verdict, the others read the verdict and the first's: the
    store is asked a number of times that grows with the processes, not with their square.

    Args:
        store: of the group; a connection of the watch's own.
        rank, size: this process's number, and how many there are.
        keeps_store: whether the store ends with this process.

    Attributes:
        reason: what has ended the group, in words that name the rank; None while all is well.
        speaker: the process that says so.
    """

    def __init__(self, store: Any, rank: int, size: int, keeps_store: bool = False) -> None:
        self.reason: str | None = None
        self.speaker = 0
        self._store, self._rank, self._size = store, rank, size
        self._keeps_store = keeps_store
        self._seen = dict.fromkeys(range(size) if rank == 0 else (0,), (b"", time.monotonic()))
        self._seen.pop(rank, None)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._run, name="loopfast-watch", daemon=True)
        self._thread.start()

    def fail(self, reason: str) -> None:
        """Tells the others that this process ends, and why."""
        with self._lock:
            # it says so itself
            self._publish(f"rank {self._rank} failed: {reason}", speaker=0)

    def done(self) -> None:
        """Ends the watch: this process needs nobody any more.

        Who keeps the store stays until the others are done, too, or have had time to read why the group ends.
        """
        self._stopped.set()
        self._thread.join(BEAT)
        try:
            with self._lock:
                self._store.set(f"beat/{self._rank}", "done")
                keys = [f"beat/{rank}" for rank in range(self._size)]
                end = time.monotonic() + (GRACE if self.reason is None else 2 * BEAT)
                while self._keeps_store and time.monotonic() < end and self._store.check(keys):
                    if set(self._store.multi_get(keys)) == {b"done"}:
                        break
                    time.sleep(0.02)
        except RuntimeError:
            return  # the store went with its process, which needs nobody either

    def _run(self) -> None:
        beat = 0
        while not self._stopped.is_set():
            try:
                with self._lock:
                    beat += 1
                    self._store.set(f"beat/{self._rank}", str(beat))
                    self._look()
            except RuntimeError as error:
                self.speaker = 1
                self.reason = self.reason or (
                    "the group's store does not answer: the process that keeps it, rank 0 or torchrun, has ended "
                    f"({first_line(error)[:120]})"
                )
            if self.reason is not None:
                break
            self._stopped.wait(BEAT)
        if not self._stopped.wait(GRACE) and self.reason is not None:
            # the main thread waits inside a library that no exception reaches
            if self._rank == self.speaker:
                print(f"error: {self.reason}", file=sys.stderr, flush=True)
            os._exit(1)

    def _look(self) -> None:
        if self._store.check(["verdict"]):
            speaker, self.reason = self._store.get("verdict").decode().split(" ", 1)
            self.speaker = int(speaker)
            return
        now = time.monotonic()
        keys = [f"beat/{rank}" for rank in self._seen]
        if not self._store.check(keys):
            return  # somebody has only just joined
        for rank, value in zip(list(self._seen), self._store.multi_get(keys), strict=True):
            last, since = self._seen[rank]
            if value != last:
                self._seen[rank] = value, now
            elif value != b"done" and now - since > SILENCE:
                self.reason = (
                    f"rank {rank} has given no sign of life for {SILENCE:.0f} s: it was killed, or hangs"
                )
                self.speaker = int(rank == 0)
                self._publish(self.reason, self.speaker)
                return

    def _publish(self, reason: str, speaker: int) -> None:
        """Tells the others, unless another has said something before."""
        try:
            if not self._store.check(["verdict"]):
                self._store.set("verdict", f"{speaker} {reason}")
        except RuntimeError:
            return  # nobody is left to be told
