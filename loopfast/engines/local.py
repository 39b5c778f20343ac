"""One process, one device: AdamW on the policy's trainable parameters."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loopfast.config import TrainConfig
from loopfast.engines.optimizers import build_optimizer, load_optimizer_state, optimizer_state
from loopfast.errors import NonFiniteError
from loopfast.policies import Policy


class LocalEngine:
    """Accumulates gradients, clips them and takes AdamW steps under a learning-rate schedule.

    Args:
        policy: whose trainable parameters it owns.
        config: the section ``train``.

    Raises:
        MissingExtraError: ``train.optimizer`` needs a package that is not installed.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self._config = config
        self._named = policy.trainable()
        self._parameters = list(self._named.values())
        self._optimizer = build_optimizer(self._parameters, config)
        self._total = config.iterations * config.updates_per_iteration * config.inner_epochs
        self._updates = 0
        # gradients of float16 activations vanish unless the loss is scaled up; a no-op for the other types
        self._new_scaler = partial(
            torch.amp.GradScaler, policy.device.type, enabled=policy.dtype == torch.float16
        )
        self._scaler = self._new_scaler()

    @property
    def learning_rate(self) -> float:
        """Of the next update: linear warm-up, then the configured course to the end of the run."""
        config = self._config
        if self._updates < config.warmup_updates:
            return config.learning_rate * (self._updates + 1) / config.warmup_updates
        course = max(1, self._total - config.warmup_updates)
        progress = min(1.0, (self._updates - config.warmup_updates) / course)
        factor = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[config.lr_schedule]
        return config.learning_rate * factor

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradient to what is accumulated for the next update."""
        self._scaler.scale(loss).backward()

    def discard(self) -> None:
        """Forgets what is accumulated for the next update, whatever state an interrupted one left behind."""
        self._optimizer.zero_grad(set_to_none=True)
        # a scaler that has unscaled an optimizer's gradients refuses to do so again before it is updated
        state = self._scaler.state_dict()
        self._scaler = self._new_scaler()
        self._scaler.load_state_dict(state)

    def update(self) -> float:
        """Takes one optimizer step with the accumulated gradient, and clears it.

        Returns:
            The gradient's norm before clipping.

        Raises:
            NonFiniteError: the gradient is NaN or infinite; the weights are as they were. (In float16 an overflow
                lowers the loss scale and skips the step instead, as usual.)
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self._parameters, self._config.max_grad_norm, foreach=True
        ).item()
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            self.discard()
            raise NonFiniteError(f"the gradient's norm is {norm}")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._updates += 1
        return norm

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Weights and optimizer state as groups of named tensors, and the rest as JSON."""
        tensors = {
            "policy": {name: parameter.detach().contiguous() for name, parameter in self._named.items()},
            "optimizer": optimizer_state(self._optimizer, self._named),
        }
        return tensors, {"updates": self._updates, "scaler": self._scaler.state_dict()}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave.

        Raises:
            ValueError: the weights are not those of this model, or the state is another optimizer's.
        """
        saved = tensors["policy"]
        if saved.keys() != self._named.keys() or any(
            saved[name].shape != parameter.shape for name, parameter in self._named.items()
        ):
            raise ValueError("its weights are not those of this configuration's model")
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(saved[name])
        load_optimizer_state(self._optimizer, self._named, tensors.get("optimizer", {}))
        self._updates = state["updates"]
        self._scaler.load_state_dict(state["scaler"])
