"""The number of images per call of a reward, which falls when they do not fit into a GPU's memory."""

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
        reward: name of the reward, for messages.
        most: the first number; None takes all images.
        halves: whether a call may have fewer images.
        advice: advice about memory for this reward, before the advice for all rewards, for messages.
    """

    def __init__(
        self, reward: str, most: int | None = None, *, halves: bool = True, advice: str = ""
    ) -> None:
        self._reward, self._most, self._halves, self._advice = reward, most, halves, advice

    def with_oom_fallback(self, count: int, device: torch.device, attempt: Callable[[int], Result]) -> Result:
        """Returns what ``attempt(size)`` returns, called with half the size for as long as memory does not suffice.

        Args:
            count, device: number of images, and the device that has the memory, for messages.
            attempt: scores all images, ``size`` in a call.

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
            # outside of the handler, where nothing holds the failed call's tensors
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
    """Returns the requested and the free memory from PyTorch's message, without the advice that follows."""
    reason = first_line(error)
    return ". ".join(reason.split(". ")[:_SENTENCES]).rstrip(".")
