"""A moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMAWeights:
    """An exponential moving average of parameters, in float32.

    After update n it is ``d · average + (1 - d) · weights`` with ``d = min(decay, (1 + n) / (10 + n))``, so that the
    weights before training are soon forgotten (as in TensorFlow's ``ExponentialMovingAverage``).

    Args:
        parameters: whole ones, by name; the average starts at their values.
        decay: the largest.

    Attributes:
        weights: the average by name.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters: list[Tensor] = list(parameters.values())
        self._decay = decay
        # copies even where the parameters are float32, and laid out as they are: otherwise the kernels that take a list
        # of tensors at once take them one by one
        self.weights = {
            name: torch.empty_like(parameter, dtype=torch.float32).copy_(parameter.detach())
            for name, parameter in parameters.items()
        }
        self._weights = list(self.weights.values())

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the weights after so many updates."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        # float() copies nothing of float32, which trained weights are wherever this is used
        torch._foreach_lerp_(self._weights, [parameter.float() for parameter in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters have the average's values."""
        before = [parameter.detach().clone() for parameter in self._parameters]
        self._set(self._weights)
        try:
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._parameters, values)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes an average back that `weights` gave."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
