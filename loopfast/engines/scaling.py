"""The loss scale of float16, without which small gradients vanish and with which large ones overflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FIRST = 65536.0
"""The scale that a run begins with."""

GROWTH_INTERVAL = 2000
"""Updates without an overflow after which the scale is doubled."""

SMALLEST = 1.0


class LossScale:
    """A factor of the loss: halved when a gradient overflows, doubled after many updates without an overflow.

    It begins and grows as torch's GradScaler does. It differs in that it neither steps the optimizer nor skips a step.
    All scales are powers of two, so that a gradient is the same to the bit whatever the scale was, as long as nothing
    overflows or vanishes.

    Args:
        enabled: whether it scales at all; else the factor is 1 and stays so.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._scale = FIRST if enabled else 1.0
        self._good_updates = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self._scale if self._enabled else loss

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divides the parameters' gradients by the scale."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._enabled and gradients:
            torch._foreach_mul_(gradients, 1.0 / self._scale)

    def lower(self) -> bool:
        """Halves the scale after an overflow; returns False where it cannot be lower, and stays."""
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
        """For a checkpoint, under the names of torch's GradScaler, which wrote them in earlier versions."""
        if not self._enabled:
            return {}
        return {"scale": self._scale, "_growth_tracker": self._good_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; nothing where that scaled nothing."""
        if self._enabled and state:
            self._scale = float(state["scale"])
            self._good_updates = int(state["_growth_tracker"])
