"""Rewards with weights: their options, when the weights are read, and the calls of the model."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.policies import pad_rows
from loopfast.rewards.fitting import ImagesPerCall, RewardMemoryError, shortage
from loopfast.system.device import torch_device
from loopfast.system.memory import is_out_of_memory, to_device

__all__ = [
    "COMMON_OPTIONS",
    "Placement",
    "PretrainedReward",
    "ScoreBatch",
    "number",
    "placement",
    "pretrained",
]

Options = ParamSpec("Options")

ScoreBatch = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]
"""Returns the scores ``[B]`` of images ``[B, 3, H, W]``, float32 in [0, 1] on the reward's device."""

COMMON_OPTIONS = {
    "revision": "branch, tag or commit of the weights on the hub.",
    "threshold": "detections of a lower confidence do not count.",
    "device": "auto (cuda if available, else cpu), cpu, cuda or cuda:N.",
    "dtype": "float32, float16 or bfloat16.",
    "batch_size": "images per model call.",
}
"""The meanings of options that rewards with weights share, where their docstrings do not give others."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Device, type and batch size of a reward's model.

    Attributes:
        reward: name of the reward, for messages.
        device: device of the model; a GPU by its number, as the current GPU differs between threads.
        dtype: type of the model's weights and activations.
        batch_size: images per model call, as long as they fit into memory.
    """

    reward: str
    device: torch.device
    dtype: torch.dtype
    batch_size: int


def placement(reward: str, device: str, dtype: str, batch_size: int) -> Placement:
    """Checks the options that every reward with weights has; see `COMMON_OPTIONS`.

    Raises:
        ConfigError: an option has a value that is not allowed, or this machine has no such device.
    """
    key = f"reward {reward!r}: "
    if dtype not in _DTYPES:
        raise ConfigError(f"{key}dtype: found {dtype!r}, allowed: {', '.join(_DTYPES)}")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"{key}batch_size: found {batch_size!r}, allowed: a whole number, at least 1")
    kind, _, index = str(device).partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ConfigError(f"{key}device: found {device!r}, allowed: auto, cpu, cuda or cuda:N")
    place = torch_device(device, key=f"{key}device")
    if place == torch.device("cuda"):
        # asking for the current GPU would start CUDA; before that it is the first one
        place = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    return Placement(reward, place, _DTYPES[dtype], batch_size)


def number(reward: str, key: str, value: float) -> float:
    """Returns the value of an option that must be a finite number.

    Raises:
        ConfigError: the value is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"reward {reward!r}: {key}: found {value!r}, allowed: a finite number")
    return float(value)


class PretrainedReward:
    """A reward that reads its weights once, in `load` or when it first scores.

    Every model call has `Placement.batch_size` rows; the last call of a batch is filled up with copies. So an image's
    score depends on the number of images it is scored with by rounding at most. After a call that ran out of memory,
    calls have half as many rows.

    Args:
        place: device, type and batch size of the model.
        load: reads the weights, and returns the function that scores a batch of any size.
    """

    def __init__(self, place: Placement, load: Callable[[], ScoreBatch]) -> None:
        self.place = place
        self._read = load
        self._score: ScoreBatch | None = None
        self._lock = threading.Lock()
        self._calls = ImagesPerCall(
            place.reward, place.batch_size, advice="its options dtype=float16 and a smaller batch_size, "
        )

    def load(self) -> ScoreBatch:
        """Reads the weights, unless they are read already, and returns the function that scores a batch.

        Raises:
            ConfigError: they cannot be found or are not those of the expected model.
            RewardMemoryError: they do not fit into a GPU's memory.
        """
        with self._lock:
            if self._score is None:
                try:
                    self._score = self._read()
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise RewardMemoryError(
                        f"reward {self.place.reward!r}: its weights do not fit into the memory of {self.place.device} "
                        f"({shortage(error)}); its options dtype=float16 or device make room"
                    ) from error
            return self._score

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Returns the scores, float32 ``[N]`` on the CPU; see `loopfast.rewards.base.Reward`."""
        score, place = self.load(), self.place

        def attempt(size: int) -> Tensor:
            parts = []
            for start in range(0, len(prompts), size):
                rows = slice(start, start + size)
                texts, entries = prompts[rows], metadata[rows]
                missing = size - len(texts)
                batch = pad_rows(to_device(images[rows], place.device, torch.float32), size)
                found = score(batch, texts + texts[:1] * missing, entries + entries[:1] * missing)
                parts.append(found[: len(texts)].float())
            return torch.cat(parts).cpu() if parts else torch.zeros(0)

        return self._calls.with_oom_fallback(len(prompts), place.device, attempt)


def pretrained(
    build: Callable[Concatenate[Placement, Options], Callable[[], ScoreBatch]],
) -> Callable[..., PretrainedReward]:
    """Decorator that makes a reward with weights, which also has the options device, dtype and batch_size.

    ``build`` has the reward's name. It checks the other options, and returns the function ``load`` of
    `PretrainedReward`.
    """

    @functools.wraps(build)
    def make(
        *args: Any, device: str = "auto", dtype: str = "float32", batch_size: int = 8, **options: Any
    ) -> PretrainedReward:
        place = placement(build.__name__, device, dtype, batch_size)
        return PretrainedReward(place, build(place, *args, **options))

    own, common = (inspect.signature(function, follow_wrapped=False) for function in (build, make))
    parameters = [*own.parameters.values()][1:] + [*common.parameters.values()][1:-1]
    make.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return make
