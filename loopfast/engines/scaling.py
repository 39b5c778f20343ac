"""The loss scale of float16. Without it small gradients underflow; with it large ones overflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FIRST = 65536.0
"""The initial scale."""

GROWTH_INTERVAL = 2000
"""The number of updates without an overflow after which the scale doubles."""

SMALLEST = 1.0


class LossScale:
    """A factor of the loss that halves when a gradient overflows and doubles after many updates without an overflow.

    It starts and grows as torch's GradScaler does, but leaves the optimizer's steps to the caller. All scales are
    powers of two, so that the scale does not change a bit of a gradient that neither overflows nor underflows.

    Args:
        enabled: whether the loss is scaled. If not, the factor stays 1.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._scale = FIRST if enabled else 1.0
        self._good_updates = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss times the scale."""
        return loss * self._scale if self._enabled else loss

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divides the parameters' gradients by the scale."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._enabled and gradients:
            torch._foreach_mul_(gradients, 1.0 / self._scale)

    def lower(self) -> bool:
        """Halves the scale after an overflow. Returns False if it is the smallest already."""
        if self._scale <= SMALLEST:
            return False
        self._scale /= 2
        self._good_updates = 0
        return True

    def succeeded(self) -> None:
        """Counts an update without an overflow."""
        self._good_updates += self._enabled
        if self._good_updates == GROWTH_INTERVAL:
            self._scale *= 2
            self._good_updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, under the names of torch's GradScaler, as earlier versions wrote it."""
        if not self._enabled:
            return {}
        return {"scale": self._scale, "_growth_tracker": self._good_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state that `state_dict` returned, if both scale."""
        if self._enabled and state:
            self._scale = float(state["scale"])
            self._good_updates = int(state["_growth_tracker"])
