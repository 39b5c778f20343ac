from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from loopfast.embedded import detector, world
from loopfast.embedded.detector import Components, detect, exact, score
from loopfast.embedded.render import SIZE, Placed, place, render
from loopfast.embedded.world import BACKGROUND, CATEGORIES, COLORS, RELATIONS, SHAPES, TEXTURES, Caption, Item
from tests.embedded.faithful import apart, draw


@cache
def captions(category: str) -> tuple[Caption, ...]:
    """Every third caption of a category, whatever its split."""
    return tuple(caption for split in world.SPLITS for caption in world.prompts(category, split))[::3]


def scenes(asked: tuple[Caption, ...], seed: int) -> list[list[Placed]]:
    rng = random.Random(seed)
    return [apart(place(caption.objects(), caption.relation, rng)) for caption in asked]


def canvas(color: tuple[float, float, float], count: int = 1) -> Tensor:
    return torch.tensor(color).view(1, 3, 1, 1).repeat(count, 1, SIZE, SIZE)


SAMPLE = tuple(caption for category in CATEGORIES for caption in world.prompts(category)[:16])
FAITHFUL = scenes(SAMPLE, 1)


@cache
def faithful() -> Tensor:
    return render(FAITHFUL)


@cache
def faithful_score() -> Tensor:
    return score(faithful(), SAMPLE)


def by_category(values: Tensor) -> dict[str, float]:
    return {
        category: values[[i for i, c in enumerate(SAMPLE) if c.category == category]].mean().item()
        for category in CATEGORIES
    }


def judged(images: Tensor, asked: Sequence[Caption], each: int = 1) -> tuple[Tensor, Tensor]:
    """`score` and `exact` of pictures that are looked at once; each of them for so many captions."""
    seen = detect(images)
    rows = torch.arange(len(images)).repeat_interleave(each)
    seen = Components(*(found[rows] for found in vars(seen).values()))
    with patch.object(detector, "detect", lambda _: seen):
        return score(images, asked), exact(images, asked)


# ---- what is right scores, what is wrong does not


@pytest.mark.parametrize("category", CATEGORIES)
def test_faithful_pictures_score(category: str) -> None:
    asked = captions(category)
    scored, right = judged(draw(asked, 1), asked)
    assert scored.mean() >= 0.95
    assert right.mean() >= 0.99


@pytest.mark.parametrize("category", CATEGORIES)
def test_pictures_of_other_captions_do_not(category: str) -> None:
    asked = captions(category)
    others = list(asked)
    random.Random(1).shuffle(others)
    told = [(a, o) for a, o in zip(asked, others, strict=True) if a.composition() != o.composition()]
    scored, right = judged(draw([other for _, other in told], 1), [a for a, _ in told])
    assert scored.mean() <= 0.1
    assert right.sum() == 0


def mistakes(caption: Caption) -> list[Caption]:
    """Captions that differ in a single attribute, in the count, or by the opposite relation.

    Not those of the other axis: an object left of another may be below it as well.
    """
    found = []
    for index, item in enumerate(caption.items):
        changed = [replace(item, color=c) for c in COLORS if c != item.color]
        if item.texture:
            changed += [replace(item, texture=t) for t in TEXTURES if t != item.texture]
        shapes = world.TEXTURED_SHAPES if item.texture else SHAPES
        changed += [replace(item, shape=s) for s in shapes if s != item.shape]
        for other in changed:
            items = tuple(other if i == index else old for i, old in enumerate(caption.items))
            found.append(replace(caption, items=items))
    if caption.relation:
        found.append(replace(caption, relation=RELATIONS[caption.relation]))
    if caption.count > 1:
        found += [replace(caption, count=n) for n in (1, 2, 3, 4) if n != caption.count]
    return found


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_single_mistake_costs(category: str) -> None:
    for caption in captions(category)[:6]:
        wrong = mistakes(caption)
        images = draw(wrong, 2)
        right = score(draw([caption] * 8, 2), [caption] * 8).mean()
        assert right > 0.85
        found, exactly = judged(images, [caption] * len(wrong))
        # three of four objects are as good as a picture with a mistake can be
        assert found.max() < 0.65, wrong[int(found.argmax())].text
        assert exactly.sum() == 0


def test_the_score_is_the_share_that_is_right_squared_less_the_excess() -> None:
    red, blue = Item("red", "circle"), Item("blue", "square")
    at = [(8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0)]

    def seen(*items: Item) -> float:
        image = render([[Placed(item, x, y, 6.0) for item, (x, y) in zip(items, at, strict=False)]])
        return score(image, ["a red circle and a blue square"]).item()

    assert seen(red, blue) == pytest.approx(1.0, abs=0.05)
    assert seen(red) == pytest.approx(1 / 4, abs=0.03)
    assert seen(red, red) == pytest.approx(1 / 4, abs=0.03)
    assert seen(red, blue, blue) == pytest.approx((2 / 3) ** 4, abs=0.03)
    assert seen(red, blue, red, blue) == pytest.approx((1 / 2) ** 4, abs=0.03)
    assert seen(Item("blue", "circle"), Item("red", "square")) < 0.02


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_seen(relation: str) -> None:
    image = draw([world.parse(f"a red circle {relation} a blue square")], 0)
    told = [f"a red circle {other} a blue square" for other in RELATIONS]
    found = dict(zip(RELATIONS, score(image.expand(4, -1, -1, -1), told).tolist(), strict=True))
    assert found.pop(relation) > 0.9
    assert found.pop(RELATIONS[relation]) == 0
    assert exact(image, [f"a red circle {relation} a blue square"]).item() == 1
    assert exact(image, [f"a red circle {RELATIONS[relation]} a blue square"]).item() == 0


def test_a_relation_without_its_objects_is_worth_nothing() -> None:
    images = draw([Caption("color", (Item("red", "circle"),))] * 4, 0)
    told = [f"a red circle {relation} a blue square" for relation in RELATIONS]
    assert score(images, told).max() < 0.02


def test_the_order_of_naming_does_not_matter() -> None:
    told = [caption.reversed() if len(caption.items) > 1 else caption for caption in SAMPLE]
    wrong = faithful().roll(1, 0)
    for images in (faithful(), wrong):
        (scored, right), (expected, exactly) = judged(images, told), judged(images, SAMPLE)
        torch.testing.assert_close(scored, expected)
        assert torch.equal(right, exactly)


def test_texts_and_captions_are_the_same() -> None:
    told = SAMPLE[:16]
    texts = [caption.text for caption in told]
    assert torch.equal(score(faithful()[:16], texts), score(faithful()[:16], told))
    with pytest.raises(ValueError, match="'a cat' is not a caption"):
        score(faithful()[:1], ["a cat"])


def test_a_score_does_not_depend_on_its_neighbors() -> None:
    noisy = (faithful() + 0.1 * torch.randn(faithful().shape)).clamp(0, 1)
    together = score(noisy, SAMPLE)
    alone = torch.cat([score(noisy[i : i + 1], SAMPLE[i : i + 1]) for i in range(0, len(SAMPLE), 11)])
    torch.testing.assert_close(together[::11], alone, atol=1e-5, rtol=0)


def test_dtypes_devices_and_gradients_are_the_callers() -> None:
    images = faithful()[:8].clone().requires_grad_()
    found = score(images, SAMPLE[:8])
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(score(images.double(), SAMPLE[:8]), found)
    torch.testing.assert_close(score(images.bfloat16(), SAMPLE[:8]), found, atol=0.1, rtol=0)


def test_no_pictures_have_no_scores() -> None:
    assert score(torch.zeros(0, 3, SIZE, SIZE), []).shape == (0,)
    assert exact(torch.zeros(0, 3, SIZE, SIZE), []).shape == (0,)


def test_components_are_described() -> None:
    scene = [
        Placed(Item("green", "triangle", "striped"), 8, 9, 6.5),
        Placed(Item("blue", "cross"), 24, 22, 6),
    ]
    seen = detect(render([scene, []]))
    assert seen.found.tolist() == pytest.approx([2, 0])
    assert (seen.area[0] > 0).tolist() == [True, True, False, False, False, False]
    order = [0, 1] if seen.x[0, 0] < 16 else [1, 0]
    for slot, object_ in zip(order, scene, strict=True):
        assert list(COLORS)[seen.color[0, slot].argmax()] == object_.item.color
        assert SHAPES[seen.shape[0, slot].argmax()] == object_.item.shape
        assert seen.x[0, slot].item() == pytest.approx(object_.x, abs=0.5)
        assert seen.y[0, slot].item() == pytest.approx(object_.y, abs=0.5)
    assert TEXTURES[seen.texture[0, order[0]].argmax()] == "striped"


def test_rings_are_filled_but_open_curves_are_not() -> None:
    ring = canvas(BACKGROUND)
    ring[:, :, 8:24, 8:24] = 0.1
    ring[:, :, 10:22, 10:22] = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
    opened = ring.clone()
    opened[:, :, 10:22, 8:10] = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
    caption = ["an outlined black square"]
    assert score(ring, caption) > 0.9
    assert score(opened, caption) < 0.2


# ---- what a policy might try instead


def assert_lost(images: Tensor, least: float) -> None:
    """Every category loses, and no picture that was seen right gains more than the blur between textures."""
    found, base = score(images, SAMPLE), faithful_score()
    before, after = by_category(base), by_category(found)
    for category in CATEGORIES:
        assert after[category] < before[category] - least, category
    right = base > 0.5
    assert (found - base)[right].max() < 0.1
    assert found.max() <= 1.0


def extra(radius: float) -> Tensor:
    rng = random.Random(0)
    return render(
        [
            [
                *scene,
                Placed(
                    Item(rng.choice(list(COLORS)), rng.choice(SHAPES)),
                    rng.uniform(2, 30),
                    rng.uniform(2, 30),
                    radius,
                ),
            ]
            for scene in FAITHFUL
        ]
    )


@pytest.mark.parametrize("radius", [1.0, 2.0, 3.0, 5.0])
def test_extra_blobs_cost(radius: float) -> None:
    assert_lost(extra(radius), 0.03)


@pytest.mark.parametrize(("count", "size"), [(3, 1), (8, 1), (3, 2), (1, 3)])
@pytest.mark.parametrize("own", [False, True], ids=["any color", "own color"])
def test_specks_cost(count: int, size: int, own: bool) -> None:
    rng = random.Random(0)
    images = faithful().clone()
    for image, caption in zip(images, SAMPLE, strict=True):
        for _ in range(count):
            x, y = rng.randrange(SIZE - size), rng.randrange(SIZE - size)
            color = caption.items[0].color if own else rng.choice(list(COLORS))
            image[:, y : y + size, x : x + size] = torch.tensor(COLORS[color]).view(3, 1, 1)
    assert_lost(images, 0.02)


@pytest.mark.parametrize("scale", [0.2, 0.3, 0.5])
def test_tiny_objects_gain_nothing(scale: float) -> None:
    tiny = render([[replace(p, radius=p.radius * scale) for p in scene] for scene in FAITHFUL])
    before, after = by_category(faithful_score()), by_category(score(tiny, SAMPLE))
    for category in CATEGORIES:
        assert after[category] < before[category] - 0.05
    if scale == 0.2:
        assert max(after.values()) < 0.1


def noise(draw_noise: Callable[[], Tensor]) -> Tensor:
    return draw_noise().clamp(0, 1).expand(len(SAMPLE), 3, SIZE, SIZE).contiguous()


@pytest.mark.parametrize("spread", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("level", [0.5, 0.96])
def test_grey_noise_is_worth_nothing(level: float, spread: float) -> None:
    images = noise(lambda: level + spread * torch.randn(len(SAMPLE), 1, SIZE, SIZE))
    scored, right = judged(images, SAMPLE)
    assert scored.mean() < 0.005
    assert right.sum() == 0


def test_colored_noise_is_worth_nothing() -> None:
    scored, right = judged(noise(lambda: torch.rand(len(SAMPLE), 3, SIZE, SIZE)), SAMPLE)
    assert scored.max() < 0.05
    assert right.sum() == 0


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_a_painted_canvas_is_worth_nothing(margin: int) -> None:
    inner = slice(margin, SIZE - margin)
    paints = [*COLORS.values(), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), BACKGROUND]
    images = canvas(BACKGROUND, len(paints))
    images[:, :, inner, inner] = torch.cat([canvas(color) for color in paints])[:, :, inner, inner]
    scored, right = judged(images, SAMPLE * len(paints), each=len(SAMPLE))
    assert scored.max() < 0.01
    assert right.sum() == 0


@pytest.mark.parametrize("columns", [3, 4, 5, 6])
def test_drawing_everything_is_worth_nothing(columns: int) -> None:
    step = SIZE / columns
    crowded = []
    for seed in range(len(SAMPLE)):
        items = [Item(color, shape) for color in COLORS for shape in SHAPES]
        random.Random(seed).shuffle(items)
        crowded.append(
            [
                Placed(items[i], (i % columns + 0.5) * step, (i // columns + 0.5) * step, 0.42 * step)
                for i in range(columns**2)
            ]
        )
    scored, right = judged(render(crowded), SAMPLE)
    assert scored.max() < 0.15
    assert scored.mean() < 0.01
    assert right.sum() == 0


def test_drawing_every_binding_is_worth_no_more_than_one_object() -> None:
    """Both objects and the two with their colors exchanged: right whatever the binding, if nothing counted."""
    asked = [c for c in SAMPLE if c.category == "color"]
    corners = [(8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0)]
    hedged = render(
        [
            [
                Placed(Item(color.color, shape.shape), *corner, 6.0)
                for (color, shape), corner in zip(
                    [(a, b) for a in caption.items for b in caption.items], corners, strict=True
                )
            ]
            for caption in asked
        ]
    )
    alone = draw([Caption("color", caption.items[:1]) for caption in asked], 0)
    scored, right = judged(hedged, asked)
    assert scored.mean() <= score(alone, asked).mean() + 0.01
    assert scored.max() <= 0.1
    assert right.sum() == 0


def test_blended_pictures_lose() -> None:
    other = faithful().roll(37, 0)
    for images, least in (
        (0.75 * faithful() + 0.25 * other, 0.4),
        ((faithful() + other) / 2, 0.85),
        (torch.minimum(faithful(), other), 0.75),
        (faithful().mean(0, keepdim=True).expand_as(faithful()), 0.9),
    ):
        assert_lost(images, least)


def test_faint_pictures_lose() -> None:
    background = canvas(BACKGROUND)
    assert score(background + 0.5 * (faithful() - background), SAMPLE).max() < 0.02
    assert score(background + 0.7 * (faithful() - background), SAMPLE).mean() < 0.2


def test_one_more_or_one_less_than_asked_loses() -> None:
    for asked in (2, 3, 4):
        caption = Caption("numeracy", (Item("green", "circle"),), count=asked)
        found = {
            count: score(draw([replace(caption, count=count)] * 4, 0), [caption] * 4).mean().item()
            for count in (1, 2, 3, 4)
        }
        assert max(found, key=lambda count: found[count]) == asked
        assert found.pop(asked) > 0.93
        assert max(found.values()) < 0.62
