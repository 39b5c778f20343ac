"""Scores a batch in parts while something else runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from loopfast.rewards.base import Scores

Item = TypeVar("Item")

WAITING = 2
"""Parts that may wait to be scored; the one who brings another waits until there is room."""


class RewardThread(Generic[Item]):
    """A thread that scores the parts of one batch in the order they come, as a context manager.

    A reward is called once for each part, with its images alone: a reward that compares the images of a whole batch
    needs ``rollout.reward_worker: none``. On leaving, the thread has ended: at once where nothing waits, else when the
    reward that is being called has returned.

    Args:
        score: gives the scores of images ``[N, 3, H, W]`` of N items; called in the thread.
    """

    def __init__(self, score: Callable[[Tensor, Sequence[Item]], Scores]) -> None:
        self._score = score
        self._parts: list[Scores] = []
        self._error: BaseException | None = None
        self._given_up = False
        self._queue: queue.Queue[_Part | None] = queue.Queue(maxsize=WAITING)
        self._thread = threading.Thread(target=self._work, name="loopfast-reward", daemon=True)

    def __enter__(self) -> RewardThread[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._given_up = True
        self._finish()

    def add(self, images: Tensor, items: Sequence[Item]) -> None:
        """Hands over images ``[N, 3, H, W]`` and their N items; waits while too many are there already.

        Raises:
            BaseException: what ``score`` raised for an earlier part.
        """
        self._raise()
        ready = None
        if images.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(images.device))
        self._queue.put(_Part(images, items, ready))

    def result(self) -> Scores:
        """The scores of all parts together, in their order, when all are there.

        Raises:
            BaseException: what ``score`` raised for one of them.
        """
        self._finish()
        self._raise()
        return join_scores(self._parts)

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (part := self._queue.get()) is not None:
            if self._given_up or self._error is not None:
                continue  # makes room for what is still to come
            try:
                with _own_stream(part):
                    self._parts.append(self._score(part.images, part.items))
            except BaseException as error:
                self._error = error
            del part


class _Part(NamedTuple):
    images: Tensor
    items: Sequence[Any]
    ready: torch.cuda.Event | None


def _own_stream(part: _Part) -> Any:
    """A stream beside that of the sampling, in which the part's images are ready; nothing on a CPU.

    In the sampling's own stream, reading a score would wait for all steps that were started meanwhile.
    """
    if part.ready is None:
        return nullcontext()
    stream = torch.cuda.Stream(part.images.device)
    stream.wait_event(part.ready)
    part.images.record_stream(stream)
    return torch.cuda.stream(stream)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive parts of a batch, at least one, as those of the batch."""
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        {name: problem for part in reversed(parts) for name, problem in part.problems.items()},
    )
