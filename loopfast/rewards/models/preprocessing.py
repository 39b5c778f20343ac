"""Image preprocessing on tensors, as image processors of transformers do it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from loopfast.errors import ConfigError, first_line
from loopfast.rewards.models.weights import Source

__all__ = ["OPENAI_MEAN", "OPENAI_STD", "ImagePreprocessing", "load_preprocessing", "normalized"]

# mean and standard deviation of CLIP's training images, red, green and blue; BLIP uses them too
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# the filters that torch has too, by PIL's numbers
_FILTERS = {2: "bilinear", 3: "bicubic"}
_CLASSES = {"CLIP": "CLIPImageProcessor", "BLIP": "BlipImageProcessor"}


@dataclass(frozen=True)
class ImagePreprocessing:
    """A function that resizes, crops and normalizes images, in this order.

    It does the same as CLIP's and BLIP's image processors of transformers, without their rounding to 8 bits before and
    in resizing: values differ by up to 1.5/255 before they are normalized.

    Attributes:
        resize: the shorter edge, or height and width; None leaves the size.
        crop: height and width of the part that is cut out in the center; None leaves all.
        mean, std: mean and standard deviation of each channel.
        interpolation: ``bicubic`` or ``bilinear``.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Converts images float32 ``[N, 3, H, W]`` in [0, 1] to a model's input, float32 ``[N, 3, h, w]``."""
        if self.resize is not None:
            size = self._size(images.shape[-2], images.shape[-1])
            # width, then height, and after each the clamp of what bicubic interpolation overshoots, as PIL does
            for shape in ((images.shape[-2], size[1]), size):
                if shape != tuple(images.shape[-2:]):
                    images = interpolate(images, shape, mode=self.interpolation, antialias=True).clamp(0, 1)
        if self.crop is not None:
            height, width = self.crop
            top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
            if top < 0 or left < 0:
                raise ValueError(
                    f"images of {list(images.shape[-2:])} pixels are smaller than {list(self.crop)}"
                )
            images = images[..., top : top + height, left : left + width]
        return normalized(images, self.mean, self.std)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize
        assert self.resize is not None
        short, long = sorted((height, width))
        long = int(self.resize * long / short)
        return (self.resize, long) if height <= width else (long, self.resize)


def normalized(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Subtracts from images ``[N, 3, H, W]`` the mean of each channel, and divides by its standard deviation."""
    return (images - _channels(mean, images.device)) / _channels(std, images.device)


@cache
def _channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Returns the values as ``[3, 1, 1]``. They are cached: a copy to a GPU waits for all that was started there."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def load_preprocessing(source: Source, kind: str = "CLIP") -> ImagePreprocessing:
    """Makes the preprocessing that a model's ``preprocessor_config.json`` describes.

    ``kind`` is ``CLIP`` or ``BLIP``, whose defaults hold for keys that the file does not have.

    Raises:
        ConfigError: the file cannot be found or read, or describes another kind of preprocessing.
    """
    import transformers

    # the processors are only read for their settings: they need torchvision or PIL to be called
    where = f"reward {source.reward!r}: the image processor of {source.name!r}"
    cls: Any = getattr(transformers, _CLASSES[kind])
    try:
        processor = cls.from_pretrained(source.name, revision=source.revision)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{where} cannot be loaded: {first_line(error)}") from error
    found = processor.to_dict()
    filter_number = int(found["resample"])
    if filter_number not in _FILTERS:
        raise ConfigError(f"{where}: resample: found {filter_number}, allowed: 2 (bilinear), 3 (bicubic)")
    if not (found["do_normalize"] and found["do_rescale"]):
        raise ConfigError(f"{where}: found do_normalize or do_rescale: false, allowed: true")
    size = dict(found["size"])
    crop = dict(found["crop_size"]) if found.get("do_center_crop") else None
    resize = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    return ImagePreprocessing(
        resize if found["do_resize"] else None,
        (crop["height"], crop["width"]) if crop else None,
        tuple(found["image_mean"]),
        tuple(found["image_std"]),
        _FILTERS[filter_number],
    )
