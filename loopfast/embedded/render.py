"""Draws scenes of the embedded world: antialiased shapes from signed distances, all images of a batch at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .world import BACKGROUND, COLORS, SHAPES, TEXTURES, Item

SIZE = 32
OUTLINE = 1.7
STRIPE_PERIOD = 4.0
CROSS_ARM = 0.32  # half-width of a cross's arm, relative to the cross's


@dataclass(frozen=True)
class Placed:
    """An object on the canvas: center and half-width in pixels."""

    item: Item
    x: float
    y: float
    radius: float


def signed_distance(shape: str, x: Tensor, y: Tensor, rx: Tensor, ry: Tensor | None = None) -> Tensor:
    """Returns the distance in pixels to the outline of a shape centered on the origin, negative inside.

    ``x``, ``y``: pixel offsets from the center; ``rx``, ``ry``: half-width and half-height (all broadcast).
    """
    ry = rx if ry is None else ry
    if shape == "circle":
        return (torch.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1.0) * torch.minimum(rx, ry)
    if shape == "square":
        return torch.maximum(x.abs() - rx, y.abs() - ry)
    if shape == "diamond":
        return (x.abs() / rx + y.abs() / ry - 1.0) * rx * ry / torch.sqrt(rx**2 + ry**2)
    if shape == "triangle":
        # apex up; the slanted side runs from (0, -ry) to (rx, ry)
        length = torch.sqrt(rx**2 + 4 * ry**2)
        side = (2 * ry * x.abs() - rx * (y + ry)) / length
        return torch.maximum(side, y - ry)
    if shape == "cross":
        upright = torch.maximum(x.abs() - rx * CROSS_ARM, y.abs() - ry)
        lying = torch.maximum(x.abs() - rx, y.abs() - ry * CROSS_ARM)
        return torch.minimum(upright, lying)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(distance: Tensor) -> Tensor:
    """Returns the share of a pixel that lies inside, from the distance of its center."""
    return (0.5 - distance).clamp(0.0, 1.0)


def render(scenes: Sequence[Sequence[Placed]]) -> Tensor:
    """Draws the scenes: float32 ``[N, 3, 32, 32]`` in [0, 1], later objects over earlier ones."""
    count = len(scenes)
    images = torch.tensor(BACKGROUND).view(1, 3, 1, 1).repeat(count, 1, SIZE, SIZE)
    axis = torch.arange(SIZE) + 0.5
    for slot in range(max((len(scene) for scene in scenes), default=0)):
        rows = [i for i, scene in enumerate(scenes) if len(scene) > slot]
        placed = [scenes[i][slot] for i in rows]
        x = axis.view(1, 1, -1) - torch.tensor([p.x for p in placed]).view(-1, 1, 1)
        y = axis.view(1, -1, 1) - torch.tensor([p.y for p in placed]).view(-1, 1, 1)
        radius = torch.tensor([p.radius for p in placed]).view(-1, 1, 1)
        shape = torch.tensor([SHAPES.index(p.item.shape) for p in placed]).view(-1, 1, 1)
        texture = torch.tensor([TEXTURES.index(p.item.texture or "filled") for p in placed]).view(-1, 1, 1)
        distance = torch.zeros(len(rows), SIZE, SIZE)
        for k, name in enumerate(SHAPES):
            distance = torch.where(shape == k, signed_distance(name, x, y, radius), distance)
        inside = coverage(distance)
        border = inside - coverage(distance + OUTLINE)
        # bands of equal width, the first one starting below the upper border
        phase = torch.remainder(y + radius - 1.0, STRIPE_PERIOD)
        band = coverage((phase - STRIPE_PERIOD / 2).abs() - STRIPE_PERIOD / 4).expand_as(inside)
        striped = torch.maximum(inside - coverage(distance + 1.0), inside * band)
        alpha = torch.where(texture == 0, inside, torch.where(texture == 1, border, striped)).unsqueeze(1)
        color = torch.tensor([COLORS[p.item.color] for p in placed]).view(-1, 3, 1, 1)
        images[rows] = images[rows] * (1 - alpha) + color * alpha
    return images


def _radius(item: Item, rng: random.Random) -> float:
    low, high = (6.6, 7.2) if item.texture else (5.6, 6.8)
    # a diamond covers half its square, and a triangle no more
    return rng.uniform(low, high) + (0.5 if item.shape in ("diamond", "triangle") else 0.0)


def place(items: Sequence[Item], relation: str | None, rng: random.Random) -> list[Placed]:
    """Places objects on the canvas: apart from each other, inside the frame, in the given relation."""
    if len(items) > 2:
        corners = [(8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0)]
        chosen = rng.sample(corners, len(items))
        return [
            Placed(item, x + rng.uniform(-1, 1), y + rng.uniform(-1, 1), rng.uniform(5.4, 6.2))
            for item, (x, y) in zip(items, chosen, strict=True)
        ]
    if len(items) == 1:
        return [Placed(items[0], rng.uniform(9, 23), rng.uniform(9, 23), _radius(items[0], rng))]
    near, far = (7.8 + rng.uniform(-0.6, 0.6), 24.2 + rng.uniform(-0.6, 0.6))
    across = [rng.uniform(10, 22) for _ in items]
    radii = [_radius(item, rng) for item in items]
    side = relation or rng.choice(("left of", "right of", "above", "below"))
    along = (near, far) if side in ("left of", "above") else (far, near)
    horizontal = side in ("left of", "right of")
    return [
        Placed(item, a if horizontal else c, c if horizontal else a, r)
        for item, a, c, r in zip(items, along, across, radii, strict=True)
    ]
