"""The geometry of spatial relations by hand-made boxes, and the rewards on small models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopfast.errors import ConfigError, RewardError
from loopfast.rewards.models.detection import Box, Detection
from loopfast.rewards.models.spatial import (
    Relation,
    depth_agreement,
    find_relation,
    pair_score,
    position_agreement,
    relation_of,
)
from tests.tiny_models import write_depth_model, write_detector

Score = Callable[..., Tensor]

LEFT, RIGHT = Box(0, 200, 100, 300), Box(300, 220, 400, 320)
TOP, BOTTOM = Box(200, 0, 300, 100), Box(220, 300, 320, 400)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a balloon on the top of a giraffe", Relation("balloon", "top", "giraffe")),
        ("a refrigerator on the bottom of a pig", Relation("refrigerator", "bottom", "pig")),
        ("a horse on the right of an airplane", Relation("horse", "right", "airplane")),
        ("a man on the left of a key", Relation("man", "left", "key")),
        ("a mouse on side of a key", Relation("mouse", "near", "key")),
        ("a giraffe next to a lamp", Relation("giraffe", "near", "lamp")),
        ("A dog near the desk", Relation("dog", "near", "desk")),
        ("The red hat was on top of the brown coat rack.", Relation("red hat", "top", "brown coat rack")),
        ("a red circle above a blue square", Relation("red circle", "top", "blue square")),
        ("a dog in front of a desk", None),
        ("a dog and a desk", None),
        ("next to a desk", None),
    ],
)
def test_relations_in_the_plane(prompt: str, expected: Relation | None) -> None:
    assert find_relation(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a sofa in front of a plate", Relation("sofa", "front", "plate")),
        ("a fish behind a butterfly", Relation("fish", "behind", "butterfly")),
        ("a suitcase hidden by a key", Relation("suitcase", "behind", "key")),
        ("a candle hidden by a candle", Relation("candle", "behind", "candle")),
        ("a cat next to a dog", None),
    ],
)
def test_relations_in_depth(prompt: str, expected: Relation | None) -> None:
    assert find_relation(prompt, depth=True) == expected


@pytest.mark.parametrize(
    ("kind", "first", "second", "expected"),
    [
        ("left", LEFT, RIGHT, 1.0),
        ("left", RIGHT, LEFT, 0.0),
        ("right", RIGHT, LEFT, 1.0),
        ("top", TOP, BOTTOM, 1.0),
        ("top", BOTTOM, TOP, 0.0),
        ("bottom", BOTTOM, TOP, 1.0),
        # more above than beside
        ("left", Box(100, 0, 200, 100), Box(150, 300, 250, 400), 0.0),
        # exactly diagonal is neither
        ("left", Box(0, 0, 10, 10), Box(100, 100, 110, 110), 0.0),
        ("top", Box(0, 0, 10, 10), Box(100, 100, 110, 110), 0.0),
        # half of each in the other: IoU 1/3
        ("left", Box(0, 0, 100, 100), Box(50, 0, 150, 100), 0.3),
        ("near", LEFT, Box(120, 200, 220, 300), 1.0),
        # below each other, however far
        ("near", Box(200, 0, 300, 100), Box(210, 400, 310, 500), 1.0),
        # 300 apart in x and 200 in y: the distance is 150 of 512
        ("near", Box(0, 0, 100, 100), Box(300, 200, 400, 300), 0.5),
    ],
)
def test_agreement_in_the_plane(kind: str, first: Box, second: Box, expected: float) -> None:
    assert position_agreement(kind, first, second, 512) == pytest.approx(expected)


def test_near_scales_with_the_image() -> None:
    boxes = Box(0, 0, 100, 100), Box(300, 200, 400, 300)
    doubled = [Box(2 * b.x0, 2 * b.y0, 2 * b.x1, 2 * b.y1) for b in boxes]
    assert position_agreement("near", *doubled, 1024) == pytest.approx(
        position_agreement("near", *boxes, 512)
    )


numbers = st.floats(0, 500, width=32)
boxes = st.builds(
    lambda x, y, w, h: Box(x, y, x + w, y + h), numbers, numbers, st.floats(1, 200), st.floats(1, 200)
)


@given(boxes, boxes, st.sampled_from([("left", "right"), ("top", "bottom"), ("near", "near")]))
def test_relations_and_their_opposites(first: Box, second: Box, kinds: tuple[str, str]) -> None:
    one = position_agreement(kinds[0], first, second, 512)
    assert 0 <= one <= 1
    assert one == pytest.approx(position_agreement(kinds[1], second, first, 512))
    if kinds[0] != "near":
        assert min(one, position_agreement(kinds[1], first, second, 512)) == 0


def nearness(*boxes: tuple[Box, float]) -> Tensor:
    """A map ``[100, 200]`` of 1 with other values inside boxes."""
    values = torch.ones(100, 200)
    for box, value in boxes:
        values[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = value
    return values


def test_agreement_in_depth() -> None:
    near, far = Box(100, 10, 140, 50), Box(100, 30, 140, 70)  # IoU 1/3
    values = nearness((far, 2.0), (near, 5.0))
    assert depth_agreement("front", near, far, values) == pytest.approx(2 / 3)
    assert depth_agreement("behind", far, near, values) == pytest.approx(2 / 3)
    assert depth_agreement("behind", near, far, values) == 0
    assert depth_agreement("front", far, near, values) == 0
    # in a map read the wrong way round, columns for rows, the boxes would lie outside


def test_in_front_takes_an_overlap() -> None:
    near, far = Box(100, 10, 140, 50), Box(20, 10, 60, 50)
    assert depth_agreement("front", near, far, nearness((near, 5.0))) == 0
    inside = Box(102, 12, 138, 48)
    assert depth_agreement("front", inside, near, nearness((inside, 5.0))) == 1.0
    # boxes thinner than a pixel have one
    assert depth_agreement("front", Box(3.2, 3.2, 3.4, 3.4), near, nearness()) == 0


def test_a_pair_is_scored_by_both_objects_and_their_places() -> None:
    relation = Relation("cat", "left", "dog")
    cat, other_cat, dog = (
        Detection("cat", 0.8, LEFT),
        Detection("cat", 0.6, RIGHT),
        Detection("dog", 0.4, RIGHT),
    )

    def agrees(first: Box, second: Box) -> float:
        return position_agreement("left", first, second, 512)

    assert pair_score(relation, [cat, other_cat, dog], agrees) == pytest.approx(0.25 * 1.2 + 0.5)
    assert pair_score(relation, [other_cat, Detection("dog", 0.4, LEFT)], agrees) == pytest.approx(0.25)
    assert pair_score(relation, [cat], agrees) == pytest.approx(0.2)
    assert pair_score(relation, [dog], agrees) == pytest.approx(0.1)
    assert pair_score(relation, [], agrees) == 0
    assert pair_score(relation, [cat], agrees, least=0.5) == 0
    assert pair_score(relation, [cat, dog], agrees, least=0.5) == pytest.approx(0.8)


def test_two_objects_of_one_name_are_two() -> None:
    relation = Relation("cat", "left", "cat")
    both = [Detection("cat", 0.8, LEFT), Detection("cat", 0.6, RIGHT)]
    assert pair_score(relation, both, lambda a, b: float((a, b) == (LEFT, RIGHT))) == pytest.approx(0.85)
    assert pair_score(relation, both[:1], lambda a, b: 1.0) == pytest.approx(0.2)


PROMPTS = [
    "a dog next to a cat",
    "a red circle on the left of a blue square",
    "a key on the top of a lamp",
    "a cow near a cow",
    "a pig on the bottom of a car",
]
PROMPTS_3D = [
    "a dog in front of a cat",
    "a candle behind a candle",
    "a key hidden by a lamp",
    "a cow behind a car",
    "a pig in front of a bee",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        "spatial": str(write_detector(folder / "detector")),
        "depth": str(write_depth_model(folder / "depth")),
    }


@pytest.mark.parametrize("name", ["spatial", "spatial_3d"])
def test_batches_and_order_change_no_score(
    name: str, weights: dict[str, str], images: Tensor, score: Score
) -> None:
    options = {"weights": weights["spatial"]}
    prompts = PROMPTS
    if name == "spatial_3d":
        options["depth_weights"], prompts = weights["depth"], PROMPTS_3D
    together = score(name, images, prompts, batch_size=8, **options)
    apart = score(name, images, prompts, batch_size=2, **options)
    order = [3, 1, 4, 0, 2]
    moved = score(name, images[order], [prompts[row] for row in order], batch_size=3, **options)
    assert torch.allclose(apart, together, atol=1e-5)
    assert torch.allclose(moved, together[order], atol=1e-5)
    assert together.std() > 0
    assert ((together >= 0) & (together <= 1)).all()


def test_the_depth_map_has_the_images_size(weights: dict[str, str], images: Tensor) -> None:
    from transformers import DepthAnythingForDepthEstimation

    from loopfast.rewards.models.depth import load_depth
    from loopfast.rewards.models.pretrained import placement
    from loopfast.rewards.models.weights import Source

    source = Source("spatial_3d", "depth_weights", weights["depth"])
    depth = load_depth(placement("spatial_3d", "cpu", "float32", 4), source)
    assert depth(images).shape == (5, 40, 48)
    # of the model's own size: the map that transformers gives
    own = torch.rand(2, 3, 28, 28)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    model = DepthAnythingForDepthEstimation.from_pretrained(weights["depth"]).eval()
    with torch.no_grad():
        expected = model(pixel_values=(own - mean) / std).predicted_depth
    assert torch.allclose(depth(own), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "prompt"), [("spatial", "a dog"), ("spatial_3d", "a dog next to a cat")])
def test_a_prompt_without_a_relation_is_an_error(
    name: str, prompt: str, weights: dict[str, str], score: Score
) -> None:
    options = {"weights": weights["spatial"]}
    if name == "spatial_3d":
        options["depth_weights"] = weights["depth"]
    with pytest.raises(
        RewardError, match=f"reward '{name}': no relation of two objects in the prompt '{prompt}'"
    ):
        score(name, torch.rand(1, 3, 32, 32), [prompt], **options)


def test_metadata_names_the_relation() -> None:
    prompt = "a cat beside a dog"
    assert relation_of(prompt, {}) is None
    assert relation_of(prompt, {"relation": ["cat", "near", "dog"]}) == Relation("cat", "near", "dog")
    assert relation_of(prompt, {"relation": ("cat", "front", "dog")}, depth=True) is not None
    for wrong in (["cat", "front", "dog"], ["cat", "dog"], "cat", ["cat", "near", 3], ["", "near", "dog"]):
        with pytest.raises(
            RewardError, match=r"metadata relation: found .*, allowed: a name, one of bottom,"
        ):
            relation_of(prompt, {"relation": wrong})


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("spatial", {"weights": "./nowhere"}, "weights: './nowhere' is not there"),
        ("spatial", {"threshold": 1.0}, "threshold: found 1.0, allowed: from 0 to below 1"),
        ("spatial", {"threshold": "high"}, "threshold: found 'high'"),
        (
            "spatial_3d",
            {"depth_weights": "DETECTOR"},
            "depth_weights: 'DETECTOR': no preprocessor_config.json",
        ),
        ("spatial_3d", {"depth_weights": "./nowhere"}, "depth_weights: './nowhere' is not there"),
    ],
)
def test_wrong_options(
    name: str, options: dict[str, object], reason: str, weights: dict[str, str], score: Score
) -> None:
    found = {"weights": weights["spatial"], **options}
    found = {key: weights["spatial"] if value == "DETECTOR" else value for key, value in found.items()}
    with pytest.raises(ConfigError) as error:
        score(name, torch.rand(1, 3, 32, 32), ["a dog"], **found)
    assert reason.replace("DETECTOR", weights["spatial"]) in str(error.value)


def test_a_model_of_distances_is_refused(tmp_path: Path, weights: dict[str, str], score: Score) -> None:
    import json

    folder = write_depth_model(tmp_path / "metric")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "depth_estimation_type": "metric"}))
    with pytest.raises(
        ConfigError, match="expected one of depth_anything or dpt that predicts relative depth"
    ):
        score(
            "spatial_3d",
            torch.rand(1, 3, 32, 32),
            ["a dog behind a cat"],
            weights=weights["spatial"],
            depth_weights=str(folder),
        )
