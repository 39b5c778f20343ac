"""How near everything in an image is: a monocular depth model of transformers.

T2I-CompBench uses MiDaS (DPT-Hybrid). Any model of ``AutoModelForDepthEstimation`` that predicts relative inverse depth
does here, such as Depth Anything (Yang et al., arXiv 2406.09414) and DPT (Ranftl et al., arXiv 2103.13413).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from loopfast.errors import ConfigError
from loopfast.rewards.models.preprocessing import normalized
from loopfast.rewards.models.pretrained import Placement, load_config, load_pretrained

__all__ = ["DEPTH_ANYTHING", "DepthModel", "load_depth"]

DEPTH_ANYTHING = "depth-anything/Depth-Anything-V2-Small-hf"
"""The default depth model: Apache-2.0, 25 million parameters."""

_KINDS = ("depth_anything", "dpt")


class DepthModel:
    """Says how near each pixel is.

    Args:
        place: where and how it computes.
        model: predicts relative inverse depth, on that device, in that type.
        size: height and width of the images it reads.
        mean, std: of each channel, subtracted and divided by.
    """

    def __init__(
        self,
        place: Placement,
        model: Any,
        size: tuple[int, int],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        self._place, self._model, self._size = place, model, size
        self._mean, self._std = mean, std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Nearness float32 ``[B, H, W]`` of images ``[B, 3, H, W]`` in [0, 1]: larger is nearer, of no unit."""
        read = interpolate(images, self._size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = normalized(read, self._mean, self._std)
        output = self._model(pixel_values=pixels.to(self._place.dtype))
        nearness = output.predicted_depth.float()[:, None]
        return interpolate(nearness, tuple(images.shape[-2:]), mode="bilinear", align_corners=False)[:, 0]


def load_depth(place: Placement, weights: str, revision: str | None) -> DepthModel:
    """A depth model of relative inverse depth from a folder or the hub.

    Raises:
        ConfigError: it cannot be found or read, is another model, or predicts distances and not inverse depth.
    """
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    config = load_config(place.reward, transformers.AutoConfig, weights, revision=revision)
    kind = config.model_type
    if kind not in _KINDS or getattr(config, "depth_estimation_type", "relative") != "relative":
        raise ConfigError(
            f"reward {place.reward!r}: depth_weights {weights!r}: found a model of type {kind!r}, expected one of "
            f"{' or '.join(_KINDS)} that predicts relative depth"
        )
    model = load_pretrained(
        place.reward, transformers.AutoModelForDepthEstimation, weights, revision=revision
    ).to(place.device, place.dtype)
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(weights, revision=revision)
        size = processor["size"]
        # DPT's first files have one number
        height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"reward {place.reward!r}: depth_weights {weights!r}: preprocessor_config.json cannot be used; expected: "
            f"size with height and width, image_mean, image_std ({type(error).__name__}: {error})"
        ) from error
    return DepthModel(place, model, (height, width), mean, std)
