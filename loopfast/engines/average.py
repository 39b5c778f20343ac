"""A moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
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
        self._parameters, self._decay = dict(parameters), decay
        # a copy of its own even where the parameters are float32
        self.weights = {
            name: p.detach().to(torch.float32, copy=True).contiguous() for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the weights after so many updates."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        for name, parameter in self._parameters.items():
            self.weights[name].lerp_(parameter.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters have the average's values."""
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes an average back that `weights` gave."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
