"""A reward that changes only as much as rounding changes its images, unlike a file's size."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3))
