"""Size of an image as a JPEG file: the two rewards of DDPO that need no model.

As defined by Black et al., *Training Diffusion Models with Reinforcement Learning* (arXiv 2305.13301): the
size in kB (1000 bytes) at quality 95, with a minus for compressibility.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from loopfast.rewards.base import Reward

__all__ = ["jpeg_compressibility", "jpeg_incompressibility"]


def jpeg_compressibility(quality: int = 95) -> Reward:
    """Minus the size in kB of the image as a JPEG: smooth images win.

    Args:
        quality: quality of the JPEG, 1 to 100.
    """
    return _size(-1.0, quality)


def jpeg_incompressibility(quality: int = 95) -> Reward:
    """The size in kB of the image as a JPEG: detailed images win.

    Args:
        quality: quality of the JPEG, 1 to 100.
    """
    return _size(1.0, quality)


def _size(sign: float, quality: int) -> Reward:
    if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
        raise ValueError(f"quality: found {quality!r}, allowed: a whole number from 1 to 100")

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        sizes = []
        pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
        for image in pixels.permute(0, 2, 3, 1).cpu():
            file = io.BytesIO()
            Image.fromarray(image.numpy()).save(file, format="JPEG", quality=quality)
            sizes.append(sign * file.tell() / 1000)
        return sizes

    return reward
