"""How many images a call of a reward takes, and what happens when they do not fit into a GPU's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from loopfast.errors import LoopfastError, first_line
from loopfast.system.memory import free_cached_memory, is_out_of_memory

__all__ = ["ImagesPerCall", "RewardMemoryError", "shortage"]

Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_SENTENCES = 3
_ADVICE = (
    "the reward on another device, a smaller rollout.microbatch and train.microbatch, model.tune=lora and a 16-bit "
    "model.dtype make room"
)


class RewardMemoryError(LoopfastError):
    """A reward ran out of a GPU's memory. Unlike after a `RewardError`, nothing is wrong with reward or images."""


class ImagesPerCall:
    """The number of images that a call of a reward takes: half as many after a call that ran out of memory.

    Args:
        reward: its name, for messages.
        most: to begin with; None: as many as there are.
        halves: whether a call may be made with fewer.
        advice: what makes room for this reward beside what makes room for any, for messages.
    """

    def __init__(
        self, reward: str, most: int | None = None, *, halves: bool = True, advice: str = ""
    ) -> None:
        self._reward, self._most, self._halves, self._advice = reward, most, halves, advice

    def with_oom_fallback(self, count: int, device: torch.device, attempt: Callable[[int], Result]) -> Result:
        """Returns what ``attempt(size)`` returns, called with half the size for as long as memory does not suffice.

        Args:
            count: images there are.
            device: where the memory is, for messages.
            attempt: scores all of them, ``size`` in a call.

        Raises:
            RewardMemoryError: the memory does not suffice for one image, or a call may not be made with fewer.
        """
        while True:
            size = count if self._most is None else self._most
            try:
                return attempt(size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = shortage(error)
            # outside of the handler, where nothing holds the failed call's tensors any more
            free_cached_memory()
            if size <= 1 or not self._halves:
                raise RewardMemoryError(
                    f"reward {self._reward!r} ran out of memory on {device} in a call with {size} image(s) ({reason}); "
                    f"{self._advice}{_ADVICE}"
                )
            self._most = size // 2
            _log.warning(
                "reward %r: %d images per call do not fit into the memory of %s; going on with %d",
                *(self._reward, size, device, self._most),
            )


def shortage(error: Exception) -> str:
    """What was asked for and what there was, without the advice that follows in PyTorch's message."""
    reason = first_line(error)
    return ". ".join(reason.split(". ")[:_SENTENCES]).rstrip(".")
