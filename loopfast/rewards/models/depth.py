"""The depth of an image, by a monocular depth model of transformers.

T2I-CompBench uses MiDaS (DPT-Hybrid). Here any model of ``AutoModelForDepthEstimation`` that predicts relative inverse
depth serves, such as Depth Anything (Yang et al., arXiv 2406.09414) and DPT (Ranftl et al., arXiv 2103.13413).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from loopfast.errors import ConfigError
from loopfast.rewards.models.preprocessing import normalized
from loopfast.rewards.models.pretrained import Placement
from loopfast.rewards.models.weights import Source

__all__ = ["DEPTH_ANYTHING", "load_depth"]

DEPTH_ANYTHING = "depth-anything/Depth-Anything-V2-Small-hf"
"""The default depth model: Apache-2.0, 25 million parameters."""

_KINDS = ("depth_anything", "dpt")


def load_depth(place: Placement, source: Source) -> Callable[[Tensor], Tensor]:
    """Loads a model of relative inverse depth from a folder or the hub.

    Returns:
        A function that returns the nearness, float32 ``[B, H, W]``, of images ``[B, 3, H, W]`` in [0, 1]: larger is
        nearer; it has no unit.

    Raises:
        ConfigError: the model cannot be found or read, is another one, or predicts distances and not inverse depth.
    """
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    config = source.load_config(transformers.AutoConfig)
    kind = config.model_type
    if kind not in _KINDS or getattr(config, "depth_estimation_type", "relative") != "relative":
        raise ConfigError(
            f"{source}: found a model of type {kind!r}, expected one of {' or '.join(_KINDS)} that predicts relative "
            "depth"
        )
    model = source.load_model(transformers.AutoModelForDepthEstimation).to(place.device, place.dtype)
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(source.name, revision=source.revision)
        size = processor["size"]
        # DPT's first files have one number for both
        height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{source}: preprocessor_config.json cannot be used; expected: size with height and width, image_mean, "
            f"image_std ({type(error).__name__}: {error})"
        ) from error

    @torch.no_grad()
    def nearness(images: Tensor) -> Tensor:
        resized = interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = normalized(resized, mean, std)
        depth = model(pixel_values=pixels.to(place.dtype)).predicted_depth.float()[:, None]
        return interpolate(depth, tuple(images.shape[-2:]), mode="bilinear", align_corners=False)[:, 0]

    return nearness
