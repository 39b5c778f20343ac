"""Pictures that show their captions, with objects that do not touch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from loopfast.embedded.render import Placed, place, render
from loopfast.embedded.world import Caption


def apart(scene: Sequence[Placed], gap: float = 2.0) -> list[Placed]:
    """Shrinks the objects of a scene of two as far as a gap of ``gap`` pixels between them needs."""
    if len(scene) != 2:
        return list(scene)
    first, second = scene
    room = max(abs(first.x - second.x), abs(first.y - second.y)) - gap
    factor = min(1.0, room / (first.radius + second.radius))
    return [replace(placed, radius=placed.radius * factor) for placed in scene]


def draw(captions: Sequence[Caption], seed: int) -> Tensor:
    """Draws a faithful picture of each caption, its objects apart: float32 ``[N, 3, 32, 32]`` in [0, 1]."""
    rng = random.Random(seed)
    return render([apart(place(caption.objects(), caption.relation, rng)) for caption in captions])
