"""An open-vocabulary detector of the objects that a prompt names.

T2I-CompBench finds objects with UniDet, which transformers does not have. OWL-ViT and OWLv2 (Minderer et al., arXiv
2205.06230 and 2306.09683) take its place here: they look for the prompt's own nouns, where UniDet has a vocabulary of
its own. Scores are for comparing models with each other, not with published numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from loopfast.errors import ConfigError
from loopfast.rewards.models.preprocessing import OPENAI_MEAN, OPENAI_STD, normalized
from loopfast.rewards.models.pretrained import Placement
from loopfast.rewards.models.weights import Source, require_folder
from loopfast.system.memory import to_device

__all__ = ["OWLV2", "Box", "Detection", "Detector", "detector_loader", "without_overlaps", "without_same"]

OWLV2 = "google/owlv2-base-patch16-ensemble"
"""The default detector: Apache-2.0, 155 million parameters, images of 960 × 960."""

_CLASSES = {"owlvit": "OwlViTForObjectDetection", "owlv2": "Owlv2ForObjectDetection"}
_QUERY = "a photo of a {}"
_SAME_OBJECT = 0.5  # IoU of boxes of one name above which they are one object


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, from the image's upper left corner; ``x1 >= x0``, ``y1 >= y0``."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box, (x, y)."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    @property
    def area(self) -> float:
        """The area of the box in square pixels."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def overlap(self, other: Box) -> float:
        """Returns the area of the intersection with another box."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0.0, width) * max(0.0, height)

    def iou(self, other: Box) -> float:
        """Returns the area of the intersection over that of the union; 0 if both boxes are empty."""
        common = self.overlap(other)
        union = self.area + other.area - common
        return common / union if union > 0 else 0.0


@dataclass(frozen=True)
class Detection:
    """An object that was found: the name it was looked for by, the confidence in [0, 1], and its box."""

    name: str
    score: float
    box: Box


def without_overlaps(found: Sequence[Detection]) -> list[Detection]:
    """Sorts detections by falling confidence; drops those that overlap one of their name by an IoU above 0.5."""
    found = sorted(found, key=lambda detection: -detection.score)
    return without_same(found, lambda a, b: a.iou(b) > _SAME_OBJECT)


def without_same(found: Sequence[Detection], same: Callable[[Box, Box], bool]) -> list[Detection]:
    """Drops detections whose box is the ``same`` as that of an earlier one of their name."""
    kept: list[Detection] = []
    for one in found:
        if not any(one.name == other.name and same(one.box, other.box) for other in kept):
            kept.append(one)
    return kept


class Detector:
    """An OWL-ViT or OWLv2 model that finds objects by their names; see `detector_loader`.

    Raises:
        ConfigError: the weights cannot be found or read, or are another model's.
    """

    def __init__(self, place: Placement, source: Source, threshold: float) -> None:
        import transformers

        kind = source.load_config(transformers.AutoConfig).model_type
        if kind not in _CLASSES:
            raise ConfigError(
                f"{source}: found a model of type {kind!r}, expected a detector of type {' or '.join(_CLASSES)}"
            )
        self._place, self._threshold = place, threshold
        self._model = source.load_model(getattr(transformers, _CLASSES[kind])).to(place.device, place.dtype)
        self._tokenizer = source.load_tokenizer()
        self._size: int = self._model.config.vision_config.image_size
        self._squared = kind == "owlv2"

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Finds objects in images.

        Args:
            images: float32 ``[B, 3, H, W]`` in [0, 1] on the model's device.
            names: the names to look for in each of the B images, at least one; the same name twice counts once.

        Returns:
            The detections in each image, highest confidence first, no object twice under one name, with boxes in pixels
            of the images.
        """
        names = [list(dict.fromkeys(wanted)) for wanted in names]
        ids, mask, count = self._queries(names)
        output = self._model(input_ids=ids, attention_mask=mask, pixel_values=self._prepared(images))
        best = output.logits.float().view(len(names), -1, count).max(-1)
        scores, labels = best.values.sigmoid().cpu(), best.indices.cpu()
        height, width = images.shape[-2:]
        side = max(height, width)
        across, down = (side, side) if self._squared else (width, height)
        boxes = output.pred_boxes.float().cpu() * torch.tensor([across, down, across, down])
        found = []
        for index, wanted in enumerate(names):
            kept = (scores[index] > self._threshold).nonzero().flatten()
            rows = zip(*(values[index, kept].tolist() for values in (labels, scores, boxes)), strict=True)
            detections = [
                Detection(wanted[label], score, _corners(box, width, height)) for label, score, box in rows
            ]
            # OWLv2 may find something in the padding
            found.append(without_overlaps([one for one in detections if one.box.area > 0]))
        return found

    def _queries(self, names: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, int]:
        """Returns the tokens ``[B · Q, L]``, their mask, and Q, the largest number of names of an image."""
        count = max(map(len, names))
        length = self._model.config.text_config.max_position_embeddings
        texts = [_QUERY.format(name) for wanted in names for name in wanted]
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        # the model skips a query whose first token is 0; its mask has one token, as softmax needs
        ids = torch.zeros(len(names) * count, length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        mask[:, 0] = 1
        rows = torch.tensor([i * count + j for i, wanted in enumerate(names) for j in range(len(wanted))])
        ids[rows], mask[rows] = tokens["input_ids"], tokens["attention_mask"]
        return to_device(ids, self._place.device), to_device(mask, self._place.device), count

    def _prepared(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        side = max(height, width)
        if self._squared and height != width:
            images = pad(images, (0, side - width, 0, side - height), value=0.5)
        if tuple(images.shape[-2:]) != (self._size, self._size):
            images = interpolate(images, (self._size, self._size), mode="bilinear", antialias=True)
        return normalized(images, OPENAI_MEAN, OPENAI_STD).to(self._place.dtype)


def detector_loader(
    place: Placement, weights: str, revision: str | None, threshold: float
) -> Callable[[], Detector]:
    """Checks the options of a reward with a detector, and returns the function that loads the detector.

    Raises:
        ConfigError: ``weights`` are not there, or ``threshold`` is no number in [0, 1).
    """
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold < 1:
        raise ConfigError(
            f"reward {place.reward!r}: threshold: found {threshold!r}, allowed: from 0 to below 1"
        )
    return partial(Detector, place, require_folder(place.reward, "weights", weights, revision), threshold)


def _corners(box: Sequence[float], width: int, height: int) -> Box:
    """Returns the part of a box, given by center, width and height, that is inside the image."""
    x, y, across, down = box
    x0, x1 = (min(max(value, 0.0), width) for value in (x - across / 2, x + across / 2))
    y0, y1 = (min(max(value, 0.0), height) for value in (y - down / 2, y + down / 2))
    return Box(x0, y0, x1, y1)
