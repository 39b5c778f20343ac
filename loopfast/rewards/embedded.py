"""Faithfulness to a caption of the embedded world, scored by its detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from loopfast.embedded import detector
from loopfast.embedded.render import SIZE
from loopfast.rewards.base import Reward

__all__ = ["embedded", "embedded_exact"]


def embedded() -> Reward:
    """Score of an image that shows its caption, in [0, 1]; a partly right image gets a part."""
    return _scored_by(detector.score)


def embedded_exact() -> Reward:
    """1 if an image shows exactly what its caption says, else 0."""
    return _scored_by(detector.exact)


def _scored_by(score: Callable[[Tensor, list[str]], Tensor]) -> Reward:
    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(
                f"the detector of the embedded world reads images of shape [3, {SIZE}, {SIZE}], not "
                f"{list(images.shape[1:])}"
            )
        return score(images, prompts)

    return reward
