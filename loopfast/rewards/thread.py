"""Scores a batch in parts while something else runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from loopfast.rewards.base import Scores

Item = TypeVar("Item")

WAITING = 2
"""Number of parts that may wait to be scored; adding another part waits until there is room."""

_LAST_WAIT = 10.0


class RewardThread(Generic[Item]):
    """A thread that scores batches part by part, in the order the parts come.

    A reward is called once for each part, with its images alone: a reward that compares the images of a whole batch
    needs ``rollout.reward_worker: none``. The thread starts with the first part and stays until `close`, and so does
    its stream on each GPU: cuDNN keeps its plans per thread, the allocator and cuBLAS keep their memory per stream, and
    little of it would be freed with them.

    It is a daemon thread, which a thread of `concurrent.futures` is not: a reward that never returns must not keep the
    program from ending.

    Args:
        score: returns the scores of images ``[N, 3, H, W]`` of N items; called in the thread.
    """

    def __init__(self, score: Callable[[Tensor, Sequence[Item]], Scores]) -> None:
        self._score = score
        self._parts: list[Scores] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._queue: queue.Queue[_Part | None] = queue.Queue(maxsize=WAITING)
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Context in which the parts of one batch are added.

        After it the thread is idle. Parts that still wait are dropped; a reward that is being called is waited for.
        """
        self._queue.join()
        self._parts, self._error, self._cancelled = [], None, False
        try:
            yield
        finally:
            self._cancelled = True
            self._queue.join()
            self._parts, self._error = [], None

    def add(self, images: Tensor, items: Sequence[Item]) -> None:
        """Adds images ``[N, 3, H, W]`` and their N items; waits while `WAITING` other parts wait.

        Raises:
            BaseException: the error that ``score`` raised for an earlier part of the batch.
        """
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="loopfast-reward", daemon=True)
            self._thread.start()
        ready = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None
        self._queue.put(_Part(images, items, ready))

    def result(self) -> Scores:
        """Waits for the scores of all parts of the batch, and returns them together, in their order.

        Raises:
            BaseException: the error that ``score`` raised for one of them.
        """
        self._queue.join()
        self._raise()
        return join_scores(self._parts)

    def close(self) -> None:
        """Ends the thread. A reward that does not return is waited for 10 seconds, and ends with the process."""
        if self._thread is None:
            return
        self._cancelled = True
        # parts still wait only where `batch` was interrupted while it waited
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
                self._queue.task_done()
        self._queue.put(None)
        self._thread.join(_LAST_WAIT)
        self._thread = None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (part := self._queue.get()) is not None:
            try:
                # after an error, parts are still taken, so that `add` does not wait for ever
                if not self._cancelled and self._error is None:
                    with self._stream(part):
                        self._parts.append(self._score(part.images, part.items))
            except BaseException as error:
                self._error = error
            # the images are freed while the thread waits for others
            del part
            self._queue.task_done()

    def _stream(self, part: _Part) -> AbstractContextManager[Any]:
        """Context of the thread's own stream, in which the part's images are ready; none on a CPU.

        In the sampling's stream, reading a score would wait for all steps that were started meanwhile.
        """
        if part.ready is None:
            return nullcontext()
        device = part.images.device
        # a new thread's device is the first one, whatever the device of the sampling thread is
        torch.cuda.set_device(device)
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_event(part.ready)
        part.images.record_stream(stream)
        return torch.cuda.stream(stream)


class _Part(NamedTuple):
    images: Tensor
    items: Sequence[Any]
    ready: torch.cuda.Event | None


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Joins the scores of consecutive parts of a batch, at least one."""
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        {name: problem for part in reversed(parts) for name, problem in part.problems.items()},
    )
