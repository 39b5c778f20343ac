"""What the trainer asks of an engine, whoever owns the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from loopfast.config import TrainConfig


class Engine(Protocol):
    """Accumulates gradients, clips them and takes optimizer steps under a learning-rate schedule.

    In a group of processes every method is called by all of them, in the same order.

    Attributes:
        sharded: whether the denoiser's weights are spread over processes, so that they are read inside `gathered`.
        retries: whether an update that ran out of memory can be tried again with fewer rows.
    """

    sharded: bool
    retries: bool

    @property
    def learning_rate(self) -> float:
        """Of the next update."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds the loss's gradient to what is accumulated for the next update; the sum over processes counts.

        Args:
            loss: this process's part of it.
            last: whether no other follows before the update.
        """

    def discard(self) -> None:
        """Forgets what is accumulated for the next update."""

    def update(self) -> float | None:
        """Takes one optimizer step with the accumulated gradient, and clears it.

        Returns:
            The gradient's norm before clipping. None where it overflows float16: no step was taken, nothing was
            counted, and the loss scale is lower now, so that the same gradient can be accumulated again. This is so in
            all processes or in none.

        Raises:
            NonFiniteError: the gradient is NaN or infinite, in float16 at the lowest loss scale too; the weights are as
                they were.
        """

    def ema_weights(self) -> AbstractContextManager[None]:
        """Inside, the policy has the moving average of its weights, where ``train.ema_decay`` keeps one."""

    def gathered(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, these parameters of the denoiser have their whole values, to be read."""

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, float32 where an optimizer keeps such; in the first process only."""

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Weights and optimizer state as groups of named tensors, and the rest as JSON.

        Neither depends on the number of processes or the engine. The tensors are there in the first process only.
        """

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave.

        Args:
            tensors: in the first process; the others' are not looked at.
            state: the same in every process.

        Raises:
            ValueError: the weights are not those of this model, or the state is another optimizer's.
        """

    def memory(self) -> dict[str, int]:
        """Bytes that this process holds: ``weights``, ``gradients``, ``optimizer`` and ``reference``."""


def learning_rate(config: TrainConfig, updates: int) -> float:
    """Of the update after so many: linear warm-up, then the configured course to the end of the run."""
    if updates < config.warmup_updates:
        return config.learning_rate * (updates + 1) / config.warmup_updates
    total = config.iterations * config.updates_per_iteration * config.inner_epochs
    progress = min(1.0, (updates - config.warmup_updates) / max(1, total - config.warmup_updates))
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.lr_schedule]
    return config.learning_rate * factor


def require_same(saved: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Makes sure that saved weights are those of a model.

    Raises:
        ValueError: they are not.
    """
    if {name: value.shape for name, value in saved.items()} != dict(shapes):
        raise ValueError("its weights are not those of this configuration's model")


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages that tensors lie in, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())
