"""Chooses the number of rows per model call, and halves it when they do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch

from loopfast.errors import ConfigError, LoopfastError
from loopfast.rollout import automatic_microbatch
from loopfast.system.memory import first_sentence, free_cached_memory, is_out_of_memory

Call = Literal["rollout", "train"]
Result = TypeVar("Result")


class Microbatches:
    """The rows per model call in the rollout and in the update pass.

    A number in the configuration does not change. If one size is ``auto``, it starts from the other. If both are
    ``auto``, they stay equal, because libraries round equal calls alike, on most processors to the last bit. The ratio
    before an update is then exactly 1. If memory does not suffice, ``auto`` halves.

    Args:
        rollout, train: ``rollout.microbatch`` and ``train.microbatch``.
        start: the first size if both are ``auto``.
        warn: receives a message at each halving.
        release: called at each halving to free memory that calls keep for reuse.
        retries: whether a failed call can be repeated. It cannot while other processes wait for its end.
    """

    def __init__(
        self,
        rollout: int | Literal["auto"],
        train: int | Literal["auto"],
        start: int,
        warn: Callable[[str], None],
        *,
        release: Callable[[], None] = lambda: None,
        retries: bool = True,
    ) -> None:
        self._retries, self._release = retries, release
        given = {"rollout": rollout, "train": train}
        self._automatic = {name for name, value in given.items() if value == "auto"}
        number = next((value for value in given.values() if value != "auto"), start)
        self._sizes = {name: number if value == "auto" else int(value) for name, value in given.items()}
        self._warn = warn

    @property
    def rollout(self) -> int:
        """The rows per model call in the rollout."""
        return self._sizes["rollout"]

    @property
    def train(self) -> int:
        """The rows per model call in the update pass."""
        return self._sizes["train"]

    @property
    def shared(self) -> bool:
        """True if rollout and update pass share one automatic size."""
        return len(self._automatic) == 2

    def automatic(self, call: Call) -> bool:
        """Returns whether the size of a call may halve."""
        return call in self._automatic

    def with_oom_fallback(self, call: Call, attempt: Callable[[int], Result]) -> Result:
        """Returns ``attempt(rows)``, and halves the rows as long as memory does not suffice.

        Raises:
            LoopfastError: memory does not suffice, and the size is fixed or 1.
        """
        while True:
            try:
                return attempt(self._sizes[call])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_sentence(error)
            # Outside the handler, so that the error no longer holds the failed call's tensors.
            self.halve(call, reason)

    def halve(self, call: Call, reason: str) -> None:
        """Halves the rows after a call ran out of memory.

        Raises:
            LoopfastError: the size is fixed, or 1.
        """
        size, key = self._sizes[call], f"{call}.microbatch"
        if not self._retries:
            raise ConfigError(
                f"{key}: {size} row(s) per model call do not fit into memory, and processes that train together cannot "
                f"try again with fewer; give a smaller number, `loopfast plan` says which ({reason})"
            )
        if call not in self._automatic:
            raise ConfigError(
                f"{key}: {size} row(s) per model call do not fit into memory; give a smaller number, or auto ({reason})"
            )
        if size == 1:
            raise LoopfastError(
                f"{key}: not even one row per model call fits into memory; train.gradient_checkpointing, "
                f"model.tune=lora and a 16-bit model.dtype need less ({reason})"
            )
        for name in self._automatic if self.shared else {call}:
            self._sizes[name] = size // 2
        # Recorded steps of the former size would occupy memory that fewer rows need.
        self._release()
        free_cached_memory()
        self._warn(f"{key}: {size} rows per model call do not fit into memory; going on with {size // 2}")

    def state_dict(self) -> dict[str, int]:
        """Returns the sizes for a checkpoint, so that a resumed run rounds as before."""
        return dict(self._sizes)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the automatic sizes from `state_dict`."""
        for name in self._automatic & state.keys():
            self._sizes[name] = state[name]


def start_size(rows: int, latent_shape: tuple[int, ...], device: torch.device) -> int:
    """Returns the first size of ``auto``: at most ``rows``, 65,536 latent elements (4 latents of 4×64×64) per call.

    On a GPU it is 16 times as many. A small model needs them to keep the GPU busy, and a large model halves them soon.
    """
    at_least = automatic_microbatch(rows, latent_shape)
    return min(rows, 16 * at_least) if device.type == "cuda" else at_least
