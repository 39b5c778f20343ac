"""T2I-CompBench's scores of spatial relations of two objects, in 2D and 3D.

The geometry is that of the benchmark's code (arXiv 2307.06350; ``UniDet_eval/2D_spatial_eval.py`` and
``3D_spatial_eval.py``): half of the score is for the detector's confidence in both objects, half for the places of
their boxes. The detector is another one, see `loopfast.rewards.models.detection`; the functions name other differences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import RewardError
from loopfast.rewards.base import shown
from loopfast.rewards.models.depth import DEPTH_ANYTHING, load_depth
from loopfast.rewards.models.detection import OWLV2, Box, Detection, Detector, detector_loader
from loopfast.rewards.models.noun_phrases import rule_phrases
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, pretrained
from loopfast.rewards.models.weights import require_folder

__all__ = [
    "Relation",
    "depth_agreement",
    "find_relation",
    "pair_score",
    "position_agreement",
    "relation_of",
    "spatial",
    "spatial_3d",
]

_IN_THE_PLANE = {
    **dict.fromkeys(("on the left of", "to the left of"), "left"),
    **dict.fromkeys(("on the right of", "to the right of"), "right"),
    **dict.fromkeys(("on the top of", "on top of", "above"), "top"),
    **dict.fromkeys(("on the bottom of", "on bottom of", "below"), "bottom"),
    **dict.fromkeys(("next to", "on side of", "on the side of", "near"), "near"),
}
_IN_DEPTH = {"in front of": "front", "behind": "behind", "hidden by": "behind", "hidden behind": "behind"}

_OVERLAP = 0.1  # IoU up to which boxes count as beside each other
_DEPTH_OVERLAP = 0.5  # IoU from which on boxes count as in front of each other
_DISTANCE = 150 / 512  # distance of "near" over the image's larger side
_LEAST = 0.5  # 2D scores below this are 0
_ARTICLE = re.compile(r"(?:a|an|the)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Relation:
    """A relation of two objects that a prompt names: ``first`` is ``kind`` of ``second``.

    ``kind`` is left, right, top, bottom or near; in depth, front or behind.
    """

    first: str
    kind: str
    second: str


def find_relation(prompt: str, *, depth: bool = False) -> Relation | None:
    """Returns the first relation of a prompt, between the noun phrases right before and after it; None without one.

    With ``depth`` it is one in depth (in front of, behind, hidden by), else one in the image's plane.
    """
    words = _IN_DEPTH if depth else _IN_THE_PLANE
    match = re.search(rf"\b({'|'.join(sorted(words, key=len, reverse=True))})\b", prompt, re.IGNORECASE)
    if match is None:
        return None
    before, after = rule_phrases(prompt[: match.start()]), rule_phrases(prompt[match.end() :])
    if not before or not after:
        return None
    first, second = (_ARTICLE.sub("", phrase, count=1).lower() for phrase in (before[-1], after[0]))
    return Relation(first, words[match.group().lower()], second)


def position_agreement(kind: str, first: Box, second: Box, side: float) -> float:
    """Returns how well two boxes agree with a relation in the plane, in [0, 1].

    Left, right, top and bottom: 1 if the centers differ in that direction, and more than in the other, else 0; boxes
    that overlap by an IoU above 0.1 count 0.1 / IoU. Near: 1 if the centers are less than 150 of 512 pixels apart in x
    or in y, else that distance over the larger of the two. ``side`` is the image's larger side in pixels: the
    benchmark's images have 512; its distance is scaled to others.
    """
    across, down = (b - a for a, b in zip(first.center, second.center, strict=True))
    if kind == "near":
        distance = _DISTANCE * side
        if min(abs(across), abs(down)) < distance:
            return 1.0
        return distance / max(abs(across), abs(down))
    toward, aside = {
        "left": (across, down),
        "right": (-across, down),
        "top": (down, across),
        "bottom": (-down, across),
    }[kind]
    if toward <= abs(aside):
        return 0.0
    overlap = first.iou(second)
    return 1.0 if overlap < _OVERLAP else _OVERLAP / overlap


def depth_agreement(kind: str, first: Box, second: Box, nearness: Tensor) -> float:
    """Returns how well two boxes agree with a relation in depth, in [0, 1].

    IoU / 0.5, at most 1, if the mean nearness inside the first box is larger (front) or smaller (behind) than inside
    the second, else 0. The benchmark's code takes rows of the depth map for columns; this code does not. ``nearness``
    is ``[H, W]``, larger is nearer.
    """
    difference = _mean_inside(nearness, first) - _mean_inside(nearness, second)
    if (difference if kind == "front" else -difference) <= 0:
        return 0.0
    return min(1.0, first.iou(second) / _DEPTH_OVERLAP)


def pair_score(
    relation: Relation, found: Sequence[Detection], agreement: Callable[[Box, Box], float], least: float = 0.0
) -> float:
    """Returns the benchmark's score of an image, in [0, 1]: ¼ (s₁ + s₂) + ½ agreement, or ¼ s if one object is found.

    Each object is the detection of its name with the highest confidence s; for "a candle behind a candle", the two
    highest.

    Args:
        relation, found: the objects' relation, and detections, highest confidence first.
        agreement: returns how well two boxes agree with the relation, in [0, 1].
        least: lower scores become 0.
    """
    firsts = [one for one in found if one.name == relation.first]
    seconds = [one for one in found if one.name == relation.second]
    if relation.first == relation.second:
        firsts, seconds = firsts[:1], firsts[1:]
    objects = [*firsts[:1], *seconds[:1]]
    score = 0.25 * sum(one.score for one in objects)
    if len(objects) == 2:
        score += 0.5 * agreement(objects[0].box, objects[1].box)
    return score if score >= least else 0.0


@pretrained
def spatial(
    place: Placement, weights: str = OWLV2, revision: str | None = None, threshold: float = 0.1
) -> Callable[[], ScoreBatch]:
    """Score of two objects that are left, right, on top, below or near each other as the prompt says, in [0, 1].

    The relation is read from the metadata's ``relation``, such as ``[cat, left, dog]``, with left, right, top, bottom
    or near, if given, else from the prompt. A prompt without a relation is an error.

    Args:
        weights: an OWL-ViT or OWLv2 detector, a folder or a hub name.
    """
    load_detector = detector_loader(place, weights, revision, threshold)
    return lambda: _pair_scores(load_detector())


@pretrained
def spatial_3d(
    place: Placement,
    weights: str = OWLV2,
    depth_weights: str = DEPTH_ANYTHING,
    revision: str | None = None,
    depth_revision: str | None = None,
    threshold: float = 0.1,
) -> Callable[[], ScoreBatch]:
    """Score of one object that is in front of, behind or hidden by the other as the prompt says, in [0, 1].

    The relation is read from the metadata's ``relation``, such as ``[cat, front, dog]``, with front or behind, if
    given, else from the prompt. A prompt without a relation is an error.

    Args:
        weights: an OWL-ViT or OWLv2 detector, a folder or a hub name.
        depth_weights: a DPT or Depth Anything model of relative depth, a folder or a hub name.
        revision, depth_revision: branch, tag or commit of each on the hub.
    """
    load_detector = detector_loader(place, weights, revision, threshold)
    files = "config.json", "preprocessor_config.json"
    depth_source = require_folder(place.reward, "depth_weights", depth_weights, depth_revision, files)
    return lambda: _pair_scores(load_detector(), load_depth(place, depth_source))


def _pair_scores(detector: Detector, depth: Callable[[Tensor], Tensor] | None = None) -> ScoreBatch:
    """Returns the function that scores by relations in the plane, or with ``depth`` by relations in depth."""

    def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        relations = []
        for prompt, entry in zip(prompts, metadata, strict=True):
            relation = relation_of(prompt, entry, depth=depth is not None)
            if relation is None:
                words = ", ".join(_IN_THE_PLANE if depth is None else _IN_DEPTH)
                raise RewardError(f"no relation of two objects in the prompt {shown(prompt)}; known: {words}")
            relations.append(relation)
        found = detector(images, [[relation.first, relation.second] for relation in relations])
        agreements: Iterable[Callable[[str, Box, Box], float]]
        if depth is None:
            agreements = [partial(position_agreement, side=max(images.shape[-2:]))] * len(relations)
        else:
            agreements = [partial(depth_agreement, nearness=nearness) for nearness in depth(images).cpu()]
        least = _LEAST if depth is None else 0.0
        return torch.tensor(
            [
                pair_score(relation, detections, partial(agreement, relation.kind), least)
                for relation, detections, agreement in zip(relations, found, agreements, strict=True)
            ]
        )

    return score


def relation_of(prompt: str, entry: Mapping[str, Any], *, depth: bool = False) -> Relation | None:
    """Returns the relation that a prompt's metadata names, or else the first of its text; None without one.

    Raises:
        RewardError: the metadata's ``relation`` is none.
    """
    if "relation" not in entry:
        return find_relation(prompt, depth=depth)
    found = entry["relation"]
    kinds = sorted(set((_IN_DEPTH if depth else _IN_THE_PLANE).values()))
    texts = isinstance(found, list | tuple) and all(isinstance(part, str) and part.strip() for part in found)
    if not texts or len(found) != 3 or found[1] not in kinds:
        raise RewardError(
            f"prompt {shown(prompt)}: metadata relation: found {found!r}, allowed: a name, one of "
            f"{', '.join(kinds)}, a name"
        )
    return Relation(*found)


def _mean_inside(values: Tensor, box: Box) -> float:
    """Returns the mean of ``[H, W]`` over the pixels of a box, at least one."""
    height, width = values.shape
    left, top = min(int(box.x0), width - 1), min(int(box.y0), height - 1)
    right, bottom = max(int(box.x1), left + 1), max(int(box.y1), top + 1)
    return float(values[top:bottom, left:right].mean())
