"""The exponential moving average (EMA) of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMAWeights:
    """An exponential moving average of parameters, in float32.

    After update n it is ``d · average + (1 - d) · weights`` with ``d = min(decay, (1 + n) / (10 + n))``, so that the
    initial weights are soon forgotten (as in TensorFlow's ``ExponentialMovingAverage``).

    Args:
        parameters: full parameters by name. The average starts at their values.
        decay: the largest ``d``.

    Attributes:
        weights: the averages by name.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters: list[Tensor] = list(parameters.values())
        self._decay = decay
        # Always copies, with the parameters' strides: the kernels for lists of tensors need equal strides to be fast.
        self.weights = {
            name: torch.empty_like(parameter, dtype=torch.float32).copy_(parameter.detach())
            for name, parameter in parameters.items()
        }
        self._weights = list(self.weights.values())

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Adds the weights of now, after this number of updates, to the average."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        # trained weights are float32 wherever this class is used, so float() copies nothing
        torch._foreach_lerp_(self._weights, [parameter.float() for parameter in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the parameters have the average's values."""
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
        """Restores an average that was saved from `weights`."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
