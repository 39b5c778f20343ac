"""Notices when another process of the run dies or hangs, names its rank, and ends processes that would wait forever."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from loopfast.errors import first_line

BEAT = 2.0
"""Seconds between two heartbeats."""

SILENCE = 30.0
"""Seconds without a heartbeat after which a process counts as dead."""

GRACE = 10.0
"""Seconds that a process has, once another is known to be dead, to end by itself."""


class Heartbeat:
    """A thread that writes this rank's heartbeat to the store and reads the heartbeats of other ranks.

    Rank 0 reads every rank's heartbeat and publishes a verdict. The other ranks read the verdict and rank 0's
    heartbeat. So the number of requests grows with the number of ranks, not with its square.

    Args:
        store: a connection to the key-value store that no other thread uses.
        rank: the number of this process.
        size: the number of processes.
        keeps_store: whether this process keeps the store, which ends with it.

    Attributes:
        reason: why the run cannot continue; it names a rank. None while all ranks are alive.
        reporting_rank: the rank that prints the reason.
    """

    def __init__(self, store: Any, rank: int, size: int, keeps_store: bool = False) -> None:
        self.reason: str | None = None
        self.reporting_rank = 0
        self._store, self._rank, self._size = store, rank, size
        self._keeps_store = keeps_store
        self._seen = dict.fromkeys(range(size) if rank == 0 else (0,), (b"", time.monotonic()))
        self._seen.pop(rank, None)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._run, name="loopfast-heartbeat", daemon=True)
        self._thread.start()

    def fail(self, reason: str) -> None:
        """Publishes that this rank ends with an error, and why."""
        with self._lock:
            # This rank prints its own error; rank 0 is named here for the others.
            self._publish(f"rank {self._rank} failed: {reason}", reporting_rank=0)

    def stop(self) -> None:
        """Ends the thread, as this rank no longer depends on the others.

        The process that keeps the store waits until all ranks have stopped, or have had time to read the verdict.
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
            return  # The process that kept the store has stopped, too.

    def _run(self) -> None:
        beat = 0
        while not self._stopped.is_set():
            try:
                with self._lock:
                    beat += 1
                    self._store.set(f"beat/{self._rank}", str(beat))
                    self._read_others()
            except RuntimeError as error:
                self.reporting_rank = 1
                self.reason = self.reason or (
                    "the processes' key-value store does not answer: the process that keeps it, rank 0 or "
                    f"torchrun, has ended ({first_line(error)[:120]})"
                )
            if self.reason is not None:
                break
            self._stopped.wait(BEAT)
        if not self._stopped.wait(GRACE) and self.reason is not None:
            # The main thread waits inside a library that no exception reaches.
            if self._rank == self.reporting_rank:
                print(f"error: {self.reason}", file=sys.stderr, flush=True)
            os._exit(1)

    def _read_others(self) -> None:
        if self._store.check(["verdict"]):
            rank, self.reason = self._store.get("verdict").decode().split(" ", 1)
            self.reporting_rank = int(rank)
            return
        now = time.monotonic()
        keys = [f"beat/{rank}" for rank in self._seen]
        if not self._store.check(keys):
            return  # A rank has not written its first heartbeat yet.
        for rank, value in zip(list(self._seen), self._store.multi_get(keys), strict=True):
            last, since = self._seen[rank]
            if value != last:
                self._seen[rank] = value, now
            elif value != b"done" and now - since > SILENCE:
                self.reason = (
                    f"rank {rank} has given no sign of life for {SILENCE:.0f} s: it was killed, or hangs"
                )
                self.reporting_rank = int(rank == 0)
                self._publish(self.reason, self.reporting_rank)
                return

    def _publish(self, reason: str, reporting_rank: int) -> None:
        """Writes the verdict, unless another rank has written one."""
        try:
            if not self._store.check(["verdict"]):
                self._store.set("verdict", f"{reporting_rank} {reason}")
        except RuntimeError:
            return  # The store is gone, so no rank is left to read the verdict.
