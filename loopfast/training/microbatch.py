"""How many rows a model call takes, and what happens when they do not fit into memory."""

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
    """Rows per model call, in the rollout and in the replay.

    A number in the configuration stays. ``auto`` beside a number starts from that number. Where both are ``auto``
    they are one size and stay so, because libraries round equal calls alike, on most processors to the last bit: the
    ratio before an update is then 1 exactly. Where memory does not suffice, ``auto`` halves.

    Args:
        rollout, train: ``rollout.microbatch`` and ``train.microbatch``.
        start: what ``auto`` begins with when both are.
        warn: is told of each halving.
        release: called at each halving; frees what the calls keep for the next time.
        retries: whether a call that failed can be made again; not where other processes wait for its end.
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
        """Rows per model call where images are sampled."""
        return self._sizes["rollout"]

    @property
    def train(self) -> int:
        """Rows per model call where they are trained on."""
        return self._sizes["train"]

    @property
    def shared(self) -> bool:
        """Whether rollout and replay have one automatic size."""
        return len(self._automatic) == 2

    def automatic(self, call: Call) -> bool:
        """Whether the size of a call may halve."""
        return call in self._automatic

    def with_oom_fallback(self, call: Call, attempt: Callable[[int], Result]) -> Result:
        """What ``attempt(rows)`` returns, called with fewer rows for as long as memory does not suffice.

        Raises:
            LoopfastError: it does not, and the size is given or is 1 already.
        """
        while True:
            try:
                return attempt(self._sizes[call])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_sentence(error)
            # outside of the handler, where nothing holds the failed call's tensors any more
            self.halve(call, reason)

    def halve(self, call: Call, reason: str) -> None:
        """Goes on with half of the rows, after a call ran out of memory.

        Raises:
            LoopfastError: the size is given, or is 1 already.
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
        # recorded steps of the former size would take the room that fewer rows need
        self._release()
        free_cached_memory()
        self._warn(f"{key}: {size} rows per model call do not fit into memory; going on with {size // 2}")

    def state_dict(self) -> dict[str, int]:
        """The sizes, for a checkpoint: a resumed run rounds as the one it continues."""
        return dict(self._sizes)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes back the automatic ones of :meth:`state_dict`'s sizes."""
        for name in self._automatic & state.keys():
            self._sizes[name] = state[name]


def start_size(rows: int, latent_shape: tuple[int, ...], device: torch.device) -> int:
    """What ``auto`` begins with: at most ``rows``, of 65,536 latent elements (4 latents of 4×64×64) per model call.

    On a GPU of 16 times as many, which a small model needs to fill one and which a large one halves soon.
    """
    at_least = automatic_microbatch(rows, latent_shape)
    return min(rows, 16 * at_least) if device.type == "cuda" else at_least
