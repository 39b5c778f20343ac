"""Scores a picture against a caption of the embedded world.

The picture is segmented into connected components. Each is compared with every color of the palette, every shape
(overlap with a template of the component's own size) and every texture. A caption's objects are then matched with
components, one to one. The score is

    ( Σ matches / asked )²  ·  ( asked / max(asked, found) )⁴  ·  relation

with the numbers of objects asked for and found. A missing object costs as much as a wrong attribute; a superfluous
object costs more than both, so that a picture gains nothing by showing every answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .render import SIZE, coverage, signed_distance
from .world import BACKGROUND, COLORS, SHAPES, TEXTURES, Caption, Item, parse

MAX_COMPONENTS = 6
FOREGROUND = 0.28  # distance from the background's color from which a pixel belongs to an object
COLOR_WIDTH = 0.13  # standard deviation of a color match, in RGB distance
SHAPE_WIDTH = 0.025  # temperature of the contest between shapes, in overlap
FITS = (0.92, 1.0, 1.08, 1.16)  # sizes a template is tried at, relative to the component's measured extent
EXTENT = (18.0, 24.0)  # width in pixels from which a shape counts as a painted canvas, not as an object
CORE_DEPTH = 3.0  # distance in pixels from the outline at which a texture shows
OBJECT_AREA = 20.0  # pixels from which a component counts as a whole object
GAP = (2.0, 6.0)  # pixels between centers at which a relation begins to hold, and holds fully


@dataclass(frozen=True)
class Components:
    """The components of ``N`` pictures, up to ``M`` in each, largest first.

    ``area`` [N, M] in pixels; ``color`` [N, M, 8], ``shape`` [N, M, 5], ``texture`` [N, M, 3]: soft matches in
    [0, 1]; ``x``, ``y`` [N, M]: centers in pixels; ``found`` [N]: numbers of objects, in which specks count in part.
    """

    area: Tensor
    color: Tensor
    shape: Tensor
    texture: Tensor
    x: Tensor
    y: Tensor
    found: Tensor


def detect(images: Tensor) -> Components:
    """Finds the objects in float images ``[N, 3, 32, 32]`` in [0, 1]."""
    images = images.detach().float().cpu()
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
    contrast = (images - background).norm(dim=1)
    labels = _label(contrast > FOREGROUND)
    count = images.shape[0]

    sizes = torch.zeros(count, SIZE * SIZE + 1)
    sizes.scatter_add_(1, labels.flatten(1), torch.ones(count, SIZE * SIZE))
    sizes[:, 0] = 0
    found = (sizes / OBJECT_AREA).clamp(max=1.0).sum(1)
    area, label = sizes.topk(MAX_COMPONENTS, dim=1)

    # most pictures have fewer than MAX_COMPONENTS: from here on, each component has a row
    picture, slot = torch.nonzero(area > 0, as_tuple=True)
    masks = labels[picture] == label[picture, slot].view(-1, 1, 1)
    contrast = contrast[picture]

    # the pixels farthest from the background carry the color, its blurred rim does not
    weight = masks * contrast**4
    weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-12)
    color = torch.einsum("phw,pchw->pc", weight, images[picture])
    strength = (color - background.view(1, 3)).norm(dim=-1).clamp(min=FOREGROUND)

    # coverage, with the rim just outside the mask
    alpha = (contrast / strength.view(-1, 1, 1)).clamp(max=1.0) * _dilate(masks.float())
    silhouette = torch.maximum(alpha, _filled(masks).float())

    columns, rows = silhouette.amax(1), silhouette.amax(2)
    axis = torch.arange(SIZE) + 0.5
    width, height = columns.sum(-1).clamp(min=1.0), rows.sum(-1).clamp(min=1.0)
    x, y = (columns * axis).sum(-1) / width, (rows * axis).sum(-1) / height
    dx = axis.view(1, 1, -1) - x.view(-1, 1, 1)
    dy = axis.view(1, -1, 1) - y.view(-1, 1, 1)
    rx, ry = (width / 2).view(-1, 1, 1), (height / 2).view(-1, 1, 1)

    overlaps, cores = [], []
    total = silhouette.sum((1, 2))
    for name in SHAPES:
        fits = []
        for scale in FITS:
            template = coverage(signed_distance(name, dx, dy, rx * scale, ry * scale))
            common = torch.minimum(template, silhouette).sum((1, 2))
            fits.append(common / (template.sum((1, 2)) + total - common))
        overlaps.append(torch.stack(fits).amax(0))
        cores.append(coverage(signed_distance(name, dx, dy, rx, ry) + CORE_DEPTH))
    overlap = torch.stack(overlaps, -1)
    shape = (
        torch.softmax(overlap / SHAPE_WIDTH, -1)
        * _ramp(overlap, 0.45, 0.75)
        * _ramp(torch.minimum(width / height, height / width), 0.4, 0.7).unsqueeze(-1)
        * (1 - _ramp(torch.maximum(width, height), *EXTENT)).unsqueeze(-1)
    )

    palette = torch.tensor(list(COLORS.values()))
    distance = torch.cdist(color, palette)
    contest = torch.softmax(-(distance**2) / (2 * COLOR_WIDTH**2), -1)
    color_match = contest * torch.exp(-((distance - COLOR_WIDTH).clamp(min=0) ** 2) / (2 * COLOR_WIDTH**2))

    # inside the likeliest shape: the painted share, and its variation from row to row
    core = torch.stack(cores, 1)[torch.arange(len(overlap)), overlap.argmax(-1)]
    room = core.sum((1, 2)).clamp(min=1e-6)
    painted = (alpha * core).sum((1, 2)) / room
    row_weight = core.sum(2)
    row = (alpha * core).sum(2) / row_weight.clamp(min=1e-6)
    uneven = ((row_weight * (row - painted.unsqueeze(-1)) ** 2).sum(-1) / room).sqrt()
    banded = _ramp(uneven, 0.12, 0.22)
    filled = _ramp(painted, 0.7, 0.9) * (1 - banded)
    outlined = 1 - _ramp(painted, 0.25, 0.5)
    striped = banded * _ramp(painted, 0.2, 0.4) * (1 - _ramp(painted, 0.8, 0.95))
    texture = torch.stack([filled, outlined, striped], -1)

    def by_picture(values: Tensor) -> Tensor:
        spread = values.new_zeros(count, MAX_COMPONENTS, *values.shape[1:])
        spread[picture, slot] = values
        return spread

    return Components(area, *map(by_picture, (color_match, shape, texture, x, y)), found)


def _dilate(values: Tensor) -> Tensor:
    """Returns the maximum over each pixel of ``[..., H, W]`` and its eight neighbors."""
    for dim in (-1, -2):
        last = values.shape[dim] - 1
        grown = values.clone()
        for start, neighbor in ((0, 1), (1, 0)):
            part = grown.narrow(dim, start, last)
            torch.maximum(part, values.narrow(dim, neighbor, last), out=part)
        values = grown
    return values


def _label(mask: Tensor) -> Tensor:
    """Labels the connected components of ``[N, H, W]`` masks: int64, 0 outside."""
    height, width = mask.shape[1:]
    labels = torch.arange(1, height * width + 1, dtype=torch.int16).view(1, height, width) * mask
    while True:
        grown = _dilate(labels) * mask
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


def _filled(masks: Tensor) -> Tensor:
    """Fills ``[P, H, W]`` masks: True where a pixel is part of its mask, or enclosed by it."""
    # the bits of one integer are a row of pixels
    bits = 1 << torch.arange(SIZE)
    free = (~masks * bits).sum(-1)
    border = torch.full((SIZE,), int(bits[0] | bits[-1]))
    border[0] = border[-1] = int(bits.sum())
    outside = free & border
    while True:
        # four neighbors, so that the outside does not leak through a diagonal line
        grown = outside | outside << 1 | outside >> 1
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown &= free
        if torch.equal(grown, outside):
            return (outside.unsqueeze(-1) & bits) == 0
        outside = grown


def _ramp(value: Tensor, low: float, high: float) -> Tensor:
    return ((value - low) / (high - low)).clamp(0.0, 1.0)


def _captions(captions: Sequence[str | Caption]) -> list[Caption]:
    return [parse(caption) if isinstance(caption, str) else caption for caption in captions]


def score(images: Tensor, captions: Sequence[str | Caption]) -> Tensor:
    """Scores how well each picture shows its caption: float32 ``[N]`` in [0, 1].

    Args:
        images: float ``[N, 3, 32, 32]`` in [0, 1].
        captions: N captions of the embedded world.

    Raises:
        ValueError: a caption is not of this world.
    """
    seen = detect(images)
    return torch.tensor([_score(seen, row, caption) for row, caption in enumerate(_captions(captions))])


def _score(seen: Components, row: int, caption: Caption) -> float:
    matches = [_matches(seen, row, item) for item in caption.items]
    asked = len(caption.objects())
    excess = max(float(asked), float(seen.found[row])) / asked
    scale = 1 / (asked * excess**2)
    if len(matches) == 1:
        return (sum(sorted(matches[0])[-asked:]) * scale) ** 2
    x, y = seen.x[row].tolist(), seen.y[row].tolist()
    best = 0.0
    for i, j in itertools.permutations(range(MAX_COMPONENTS), 2):
        value = ((matches[0][i] + matches[1][j]) * scale) ** 2
        if caption.relation and value > best:
            # a relation needs both objects
            value *= _relation(caption.relation, x[j] - x[i], y[j] - y[i]) * min(
                1.0, 2 * matches[0][i], 2 * matches[1][j]
            )
        best = max(best, value)
    return best


def _matches(seen: Components, row: int, item: Item) -> list[float]:
    """Returns how well each component of a picture matches the item."""
    match = (seen.area[row] / OBJECT_AREA).clamp(max=1.0)
    for likeness in _likenesses(seen, row, item):
        match = match * likeness
    return match.tolist()


def _likenesses(seen: Components, row: int, item: Item) -> list[Tensor]:
    found = [seen.color[row, :, list(COLORS).index(item.color)], seen.shape[row, :, SHAPES.index(item.shape)]]
    if item.texture:
        found.append(seen.texture[row, :, TEXTURES.index(item.texture)])
    return found


def _relation(relation: str, dx: float, dy: float) -> float:
    """Returns how far "a RELATION b" holds, in [0, 1], from the offset of b's center from a's in pixels."""
    offset = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return min(1.0, max(0.0, (offset - GAP[0]) / (GAP[1] - GAP[0])))


def exact(images: Tensor, captions: Sequence[str | Caption]) -> Tensor:
    """Scores 1 if a picture shows just what its caption says, else 0: float32 ``[N]``. Arguments as in `score`."""
    seen = detect(images)
    return torch.tensor([float(_exact(seen, i, caption)) for i, caption in enumerate(_captions(captions))])


def _exact(seen: Components, row: int, caption: Caption) -> bool:
    wanted = caption.objects()
    present = [j for j in range(MAX_COMPONENTS) if seen.area[row, j] >= OBJECT_AREA / 2]
    if len(present) != len(wanted):
        return False
    is_item = [(torch.stack(_likenesses(seen, row, item)).amin(0) >= 0.5).tolist() for item in wanted]
    for order in itertools.permutations(present):
        if all(is_item[i][j] for i, j in enumerate(order)):
            offset = [float(center[row, order[-1]] - center[row, order[0]]) for center in (seen.x, seen.y)]
            if not caption.relation or _relation(caption.relation, *offset) >= 0.5:
                return True
    return False
