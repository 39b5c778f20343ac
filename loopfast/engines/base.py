"""The interface that every engine has for the trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from loopfast.config import TrainConfig


class Engine(Protocol):
    """Accumulates gradients, clips them and takes optimizer steps under a learning-rate schedule.

    In a group of processes, all of them call every method in the same order.

    Attributes:
        sharded: whether the denoiser's weights are spread over processes, so that they are read inside `gathered`.
        retries: whether an update that ran out of memory can be tried again with fewer rows.
    """

    sharded = False
    retries = False
    _train: TrainConfig
    _updates: int

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update: a linear warm-up, then ``train.lr_schedule``."""
        train, updates = self._train, self._updates
        if updates < train.warmup_updates:
            return train.learning_rate * (updates + 1) / train.warmup_updates
        total = train.iterations * train.updates_per_iteration * train.inner_epochs
        progress = min(1.0, (updates - train.warmup_updates) / max(1, total - train.warmup_updates))
        factor = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[train.lr_schedule]
        return train.learning_rate * factor

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Adds the loss's gradient to the accumulated one. The next update uses the sum over processes.

        Args:
            loss: this process's part of the loss.
            last: whether this is the last call before the update.
        """

    def discard(self) -> None:
        """Clears the accumulated gradient."""

    def update(self) -> float | None:
        """Takes one optimizer step with the accumulated gradient, and clears it.

        Returns:
            The gradient's norm before clipping. It is None, in all processes, if the gradient overflows float16. Then
            no step was taken or counted, and the loss scale is lower now, so that the same gradient can be accumulated
            again.

        Raises:
            NonFiniteError: the gradient is NaN or infinite, in float16 at the lowest loss scale too. The weights are
                unchanged.
        """

    def ema_weights(self) -> AbstractContextManager[None]:
        """Context in which the policy has its EMA weights, if ``train.ema_decay`` is set."""
        return nullcontext()

    def gathered(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which these parameters of the denoiser have their full values, for reading."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Returns the trained weights by name, in the first process only; float32 if the optimizer keeps float32."""

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Returns weights and optimizer state as named tensors by file, and the rest of the state as JSON.

        Both are the same for every number of processes and every engine. Only the first process has the tensors.
        """

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        """Restores a state that :meth:`state` returned.

        Args:
            tensors: the tensors; only those of the first process are read.
            state: the rest, equal in every process.

        Raises:
            ValueError: the weights are not those of this model, or the state is another optimizer's.
        """

    def memory(self) -> dict[str, int]:
        """Returns the bytes that this process holds: ``weights``, ``gradients``, ``optimizer`` and ``reference``."""


def require_same(saved: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Checks that saved weights have the names and shapes of a model's.

    Raises:
        ValueError: they do not.
    """
    if {name: value.shape for name, value in saved.items()} != dict(shapes):
        raise ValueError("its weights are not those of this configuration's model")


def tensor_bytes(values: Iterable[object]) -> int:
    """Returns the bytes of the storages of the tensors among some values, counting each storage once."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())
