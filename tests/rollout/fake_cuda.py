"""A fake of the parts of CUDA that record a graph: streams, graphs, and an allocator that knows of recordings.

After a failed recording the allocator behaves as in torch 2.11: it considers it as under way until it is ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeCuda:
    """A fake that replaces functions of ``torch.cuda``.

    Attributes:
        streams: all streams.
        recorded: the pool of each recording that succeeded.
        underway: the pools that the allocator considers to be recorded into.
        released: the pools whose use by a failed recording was ended.
        modes: the synchronization debug modes, in the order in which they were set.
        fresh_generators: the number of times that the default generator was given a fresh state.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ends_by_itself: bool = False) -> None:
        self.streams: list[Any] = []
        self.recorded: list[Any] = []
        self.underway: set[Any] = set()
        self.released: list[Any] = []
        self.modes: list[Any] = []
        self.fresh_generators = 0
        self._ends_by_itself, self._capturing, self._pools = ends_by_itself, False, 0
        cuda: dict[str, Any] = {
            "Stream": self._stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_device": lambda: 0,
            "graph_pool_handle": self._pool,
            "CUDAGraph": Graph,
            "graph": self._graph,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": self.modes.append,
            "is_initialized": lambda: True,
            "empty_cache": self._empty_cache,
            "default_generators": [
                SimpleNamespace(clone_state=lambda: "state", graphsafe_set_state=self._new_generator)
            ],
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self._release, raising=False)

    @property
    def capturing(self) -> bool:
        """True while work is recorded."""
        return self._capturing

    def wait(self) -> None:
        """Acts as work that asks the GPU for a value."""
        if self._capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.modes and self.modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=2)

    def _stream(self, device: Any) -> Any:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.streams.append(stream)
        return stream

    def _pool(self) -> tuple[int, int]:
        self._pools += 1
        return (0, self._pools)

    def _empty_cache(self) -> None:
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    @contextmanager
    def _graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self._empty_cache()
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.underway.add(pool)
        self._capturing = True
        try:
            yield
        except BaseException:
            if self._ends_by_itself:
                self.underway.remove(pool)
            # the error of capture_end, on top of the one that broke the recording
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self._capturing = False
        self.underway.remove(pool)
        self.recorded.append(pool)

    def _end(self, device: int, pool: Any) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def _release(self, device: int, pool: Any) -> None:
        self.released.append(pool)

    def _new_generator(self, state: Any) -> None:
        self.fresh_generators += 1


class Graph:
    """A graph that cannot be replayed."""

    def reset(self) -> None:
        """Does nothing: the fake allocator holds no memory."""
