from __future__ import annotations

import random

import pytest
import torch

from loopfast.embedded import world
from loopfast.embedded.render import SIZE, Placed, coverage, place, render, signed_distance
from loopfast.embedded.world import BACKGROUND, COLORS, SHAPES, Caption, Item
from tests.embedded.faithful import draw

# the share of its bounding square that a shape covers
AREAS = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "diamond": 0.5, "cross": 0.54}


def picture(item: Item, x: float = 16.0, y: float = 16.0, radius: float = 8.0) -> torch.Tensor:
    return render([[Placed(item, x, y, radius)]])[0]


def painted(image: torch.Tensor, color: str) -> torch.Tensor:
    """The share of each pixel that has the color rather than the background's."""
    background, ink = torch.tensor(BACKGROUND), torch.tensor(COLORS[color])
    span = ink - background
    return ((image - background.view(3, 1, 1)) * span.view(3, 1, 1)).sum(0) / span.square().sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_their_areas(shape: str) -> None:
    covered = painted(picture(Item("blue", shape)), "blue").sum().item()
    assert covered == pytest.approx(AREAS[shape] * 16**2, rel=0.06)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_negative_inside_and_zero_on_the_outline(shape: str) -> None:
    radius = torch.tensor(6.0)
    zero = torch.tensor(0.0)
    assert signed_distance(shape, zero, zero, radius) < 0
    assert signed_distance(shape, torch.tensor(9.0), torch.tensor(9.0), radius) > 0
    # every shape stands on its lowest row
    assert signed_distance(shape, zero, radius, radius).abs() < 1e-5


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'hexagon'"):
        signed_distance("hexagon", torch.zeros(1), torch.zeros(1), torch.ones(1))


def test_coverage_is_antialiased() -> None:
    distance = torch.tensor([-3.0, -0.25, 0.0, 0.25, 3.0])
    torch.testing.assert_close(coverage(distance), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_textures_differ_inside_only() -> None:
    filled, outlined, striped = (
        painted(picture(Item("red", "square", texture)), "red")
        for texture in ("filled", "outlined", "striped")
    )
    torch.testing.assert_close(filled, painted(picture(Item("red", "square")), "red"))
    core = slice(12, 20)
    assert filled[core, core].min() > 0.99
    assert outlined[core, core].max() < 0.01
    rows = striped[core, core].mean(1)
    assert rows.max() > 0.9
    assert rows.min() < 0.1
    for texture in (outlined, striped):
        assert texture[8, core].min() > 0.9  # the rim is drawn


def test_a_picture_does_not_depend_on_its_neighbors() -> None:
    captions = world.prompts("all")[:12]
    rng = random.Random(0)
    scenes = [place(c.objects(), c.relation, rng) for c in captions]
    together = render(scenes)
    alone = torch.cat([render([scene]) for scene in scenes])
    torch.testing.assert_close(together, alone)


def test_empty_scenes_are_background() -> None:
    images = render([[], []])
    assert images.shape == (2, 3, SIZE, SIZE)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.tensor(BACKGROUND).view(1, 3, 1, 1).expand_as(images))


def test_drawing_is_decided_by_its_seed() -> None:
    captions = world.prompts("all")[:24]
    assert torch.equal(draw(captions, 3), draw(captions, 3))
    assert not torch.equal(draw(captions, 3), draw(captions, 4))
    assert draw(captions, 3).min() >= 0
    assert draw(captions, 3).max() <= 1


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_scenes_show_what_they_should_where_they_should(category: str) -> None:
    rng = random.Random(5)
    for caption in world.prompts(category):
        scene = place(caption.objects(), caption.relation, rng)
        assert tuple(p.item for p in scene) == caption.objects()
        assert all(0 < p.x < SIZE and 0 < p.y < SIZE for p in scene)
        if caption.relation:
            dx, dy = scene[1].x - scene[0].x, scene[1].y - scene[0].y
            offset = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[caption.relation]
            assert offset > 12


def test_no_relation_means_any_arrangement() -> None:
    rng = random.Random(0)
    caption = Caption("color", (Item("red", "circle"), Item("blue", "square")))
    sides = set()
    for _ in range(40):
        first, second = place(caption.objects(), None, rng)
        dx, dy = second.x - first.x, second.y - first.y
        sides.add(("right" if dx > 0 else "left") if abs(dx) > 14 else ("below" if dy > 0 else "above"))
    assert sides == {"left", "right", "above", "below"}
