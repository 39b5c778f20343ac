"""The engine that holds all weights in this process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.config import TrainConfig
from loopfast.engines.base import Engine, require_same, tensor_bytes
from loopfast.engines.ema import EMAWeights
from loopfast.engines.optimizers import build_optimizer, load_optimizer_state, optimizer_state
from loopfast.engines.scaling import LossScale
from loopfast.errors import NonFiniteError
from loopfast.policies import Policy


class LocalEngine(Engine):
    """AdamW by PyTorch or bitsandbytes; see `Engine`.

    Args:
        policy: the policy whose trainable parameters the engine owns.
        train: the section.

    Raises:
        MissingExtraError: ``train.optimizer`` needs a package that is not installed.
    """

    retries = True

    def __init__(self, policy: Policy, train: TrainConfig) -> None:
        self._policy, self._train = policy, train
        self._named = policy.trainable()
        self._parameters = list(self._named.values())
        self._optimizer = build_optimizer(self._parameters, train)
        self._updates = 0
        decay = train.ema_decay
        self._ema = None if decay is None else EMAWeights(self._named, decay)
        self._scale = LossScale(enabled=policy.dtype == torch.float16)

    @override
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._scale.scaled(loss).backward()

    @override
    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    @override
    def update(self) -> float | None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._scale.unscale(self._parameters)
        total = torch.nn.utils.clip_grad_norm_(self._parameters, self._train.max_grad_norm, foreach=True)
        norm = total.item()
        if not math.isfinite(norm):
            self.discard()
            if self._scale.lower():
                return None
            raise NonFiniteError(f"the gradient's norm is {norm}")
        self._optimizer.step()
        self._scale.succeeded()
        self._optimizer.zero_grad(set_to_none=True)
        self._updates += 1
        if self._ema is not None:
            self._ema.update(self._updates)
        return norm

    @override
    def ema_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ema is None else self._ema.applied()

    @override
    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().contiguous() for name, parameter in self._named.items()}

    @override
    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors = {"policy": self.weights(), "optimizer": optimizer_state(self._optimizer, self._named)}
        if self._ema is not None:
            tensors["average"] = self._ema.weights
        return tensors, {"updates": self._updates, "scaler": self._scale.state_dict()}

    @override
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        shapes = {name: parameter.shape for name, parameter in self._named.items()}
        require_same(tensors["policy"], shapes)
        if self._ema is not None:
            require_same(tensors.get("average", {}), shapes)
            self._ema.load(tensors["average"])
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(tensors["policy"][name])
        load_optimizer_state(self._optimizer, self._named, tensors.get("optimizer", {}))
        self._updates = state["updates"]
        self._scale.load_state_dict(state["scaler"])

    @override
    def memory(self) -> dict[str, int]:
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        states += [] if self._ema is None else self._ema.weights.values()
        reference = self._policy.reference_denoiser
        return {
            "weights": tensor_bytes(self._policy.denoiser.parameters()),
            "gradients": tensor_bytes(parameter.grad for parameter in self._parameters),
            "optimizer": tensor_bytes(states),
            "reference": 0 if reference is None else tensor_bytes(reference.parameters()),
        }
