"""Records work in CUDA graphs, and leaves the process usable after a failed recording."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from loopfast.errors import first_line
from loopfast.system.memory import is_out_of_memory

WARM_UP = 3
"""Number of calls before the recording: libraries choose algorithms and allocate in the first calls."""

_SYNCHRONIZES = "called a synchronizing CUDA operation"

# Before torch 2.12 a failed recording leaves a reference to its graph in the allocator of page-locked memory, which
# never drops it. A graph in this list is never freed, so that reference stays valid.
_failed_graphs: list[torch.cuda.CUDAGraph] = []


class CannotRecordError(Exception):
    """Work cannot be recorded; the message says why."""


class Recorder:
    """A recorder of one device's work in CUDA graphs, all with one stream and one pool of memory.

    A pool shares its blocks only within a stream, and cuBLAS keeps a workspace for each stream (32 MiB on Hopper): a
    stream for each recording would need both several times. Graphs of one recorder must not run at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(self, rewind: Callable[[], None], work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Returns the graph of ``work``.

        Args:
            rewind: called before each warm-up call of ``work``.
            work: the work to record. It may not ask the GPU for a value.

        Raises:
            CannotRecordError: the work cannot be recorded; the device can be used as before.
            torch.OutOfMemoryError: the work does not fit into memory; or another error that says so.
        """
        try:
            return self._record(rewind, work)
        except CannotRecordError:
            raise
        except Exception as error:
            # the end of a broken recording raises another error on top of the one that broke it
            causes = [error]
            while isinstance(earlier := causes[-1].__context__, Exception):
                causes.append(earlier)
            for cause in causes:
                if is_out_of_memory(cause):
                    raise cause from None
            first = causes[-1]
            raise CannotRecordError(f"{type(first).__name__}: {first_line(first)}") from error

    def _record(self, rewind: Callable[[], None], work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.no_grad():
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # after a failed recording torch.cuda.graph does not leave its own stream; this context does
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(WARM_UP - 1):
                        rewind()
                        work()
                    rewind()
                    _require_asynchronous(work)
                    return self._capture(work)
            finally:
                current.wait_stream(self._stream)

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, pool = torch.cuda.CUDAGraph(), self._pool
        try:
            # other threads, such as the rewards', use the device meanwhile and must not break the recording
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            self.renew_pool()
            _repair(graph, self._device, pool)
            raise
        return graph

    def renew_pool(self) -> None:
        """Has later recordings use a new pool. The old pool's memory is freed with its last graph."""
        self._pool = None


def _require_asynchronous(work: Callable[[], None]) -> None:
    """Runs ``work`` and checks that it never waits for the GPU.

    The debug mode belongs to the process. It warns and does not raise, because other threads may wait.

    Raises:
        CannotRecordError: the work waits; the message names the line.
    """
    thread, places = threading.get_ident(), list[str]()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Any, category: Any, filename: str, lineno: int, *more: Any, **named: Any) -> None:
            if _SYNCHRONIZES not in str(message):
                show(message, category, filename, lineno, *more, **named)
            elif threading.get_ident() == thread:
                places.append(f"{filename}:{lineno}")

        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if places:
        raise CannotRecordError(f"it waits for the GPU at {places[0]}")


def _repair(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Restores the allocator and the random generator after a failed recording.

    Before torch 2.12 ``capture_end`` raises before it tells the allocator that the recording is over (fixed in
    pytorch pull request 180395). Then ``empty_cache`` raises, and so does every later recording in the pool. Up to 2.12
    the generator still counts as recording, so that every random number on the device raises.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # raised if the allocator knows already
        torch._C._cuda_endAllocateToPool(index, pool)
        # reached only if capture_end has not done it; reset() does not release the pool then either
        torch._C._cuda_releasePool(index, pool)
        _failed_graphs.append(graph)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
