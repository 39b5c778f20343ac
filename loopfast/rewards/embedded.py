"""Faithfulness to a caption of the embedded world, judged by its detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from loopfast.embedded import detector
from loopfast.embedded.render import SIZE
from loopfast.rewards.base import Reward

__all__ = ["embedded", "embedded_exact"]


def embedded() -> Reward:
    """How well an image shows its caption, in [0, 1], partly right counting in part."""
    return _judged_by(detector.score)


def embedded_exact() -> Reward:
    """1 where an image shows exactly what its caption says, else 0."""
    return _judged_by(detector.exact)


def _judged_by(judge: Callable[[Tensor, list[str]], Tensor]) -> Reward:
    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(
                f"the detector of the embedded world reads images of shape [3, {SIZE}, {SIZE}], not "
                f"{list(images.shape[1:])}"
            )
        return judge(images, prompts)

    return reward
