"""Which objects a prompt counts, how detections are counted, and the reward on a small model with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError, RewardError
from loopfast.rewards import build_rewards
from loopfast.rewards.models.detection import Box, Detection
from loopfast.rewards.models.numeracy import OBJECTS, count_objects, count_score, counted_objects
from tests.tiny_models import write_detector

Score = Callable[..., Tensor]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("four trucks", [("truck", 4)]),
        ("one toy", [("toy", 1)]),
        ("three deer", [("deer", 3)]),
        ("two mice and a man", [("mouse", 2), ("man", 1)]),
        ("five women, six people and 7 knives", [("woman", 5), ("person", 6), ("knife", 7)]),
        ("two butterflies, eight tomatoes", [("butterfly", 2), ("tomato", 8)]),
        (
            "two candles, a cow, four balloons, and three fish created a relaxing atmosphere",
            [("candle", 2), ("cow", 1), ("balloon", 4), ("fish", 3)],
        ),
        (
            "three cakes attracted four birds to the edge of a bowl",
            [("cake", 3), ("bird", 4), ("bowl", 1)],
        ),
        ("Two Couches and an Egg.", [("couch", 2), ("egg", 1)]),
        ("a relaxing atmosphere", []),
        ("dogs", []),
    ],
)
def test_counted_objects(prompt: str, expected: list[tuple[str, int]]) -> None:
    assert counted_objects(prompt) == expected


def test_objects_of_ones_own_may_have_two_words() -> None:
    names = (*OBJECTS, "teddy bear", "wine glass")
    assert counted_objects("two teddy bears and a bear", names) == [("teddy bear", 2), ("bear", 1)]
    assert counted_objects("three wine glasses", names) == [("wine glass", 3)]


def boxes(name: str, *corners: tuple[float, float, float, float]) -> list[Detection]:
    return [Detection(name, 0.9, Box(*corner)) for corner in corners]


def test_a_box_inside_another_is_the_same_object() -> None:
    apart = boxes("cat", (0, 0, 10, 10), (20, 0, 30, 10))
    inside = boxes("cat", (1, 1, 9, 9))
    mostly = boxes("cat", (0, 5, 10, 15))
    assert count_objects([*apart, *inside]) == {"cat": 2}
    assert count_objects([*inside, *apart]) == {"cat": 2}
    assert count_objects([*apart, *mostly]) == {"cat": 3}
    assert count_objects([*apart, *boxes("dog", (1, 1, 9, 9))]) == {"cat": 2, "dog": 1}
    assert count_objects([]) == {}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"cat": 2, "dog": 1}, 1.0),
        ({"cat": 3, "dog": 1}, 0.75),
        ({"cat": 3, "dog": 2}, 0.5),
        ({"cat": 2}, 0.5),
        ({"dog": 2}, 0.25),
        ({"bird": 2}, 0.0),
        ({"cat": 0}, 0.0),
    ],
)
def test_half_for_being_there_and_half_for_the_number(counts: dict[str, int], expected: float) -> None:
    assert count_score([("cat", 2), ("dog", 1)], counts) == pytest.approx(expected)


PROMPTS = ["two dogs and a cat", "three candles", "one cow", "four keys, two pigs, and a bee", "five horses"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_detector(tmp_path_factory.mktemp("detector")))


def test_batches_and_order_change_no_score(weights: str, images: Tensor, score: Score) -> None:
    together = score("numeracy", images, PROMPTS, weights=weights, batch_size=8)
    apart = score("numeracy", images, PROMPTS, weights=weights, batch_size=2)
    order = [3, 1, 4, 0, 2]
    moved = score("numeracy", images[order], [PROMPTS[row] for row in order], weights=weights, batch_size=3)
    assert torch.allclose(apart, together, atol=1e-5)
    assert torch.allclose(moved, together[order], atol=1e-5)
    assert ((together >= 0) & (together <= 1)).all()
    assert together.max() > 0


def test_the_number_that_is_found_scores_best(weights: str, images: Tensor, score: Score) -> None:
    """Of all numbers of dogs, one has the whole score in each image, the others half of it."""
    words = ["one", "two", "three", "four", "five", *(str(number) for number in range(6, 17))]
    prompts = [f"{word} dog{'' if word == 'one' else 's'}" for word in words]
    for image in images[:2]:
        scores = score("numeracy", image.expand(len(prompts), -1, -1, -1), prompts, weights=weights)
        assert sorted(scores.tolist()) == [0.5] * 15 + [1.0]


def test_a_prompt_that_counts_nothing_is_an_error(weights: str, score: Score) -> None:
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(RewardError, match="no known object is counted in the prompt 'two zebras'"):
        score("numeracy", image, ["two zebras"], weights=weights)
    assert 0 <= float(score("numeracy", image, ["two zebras"], weights=weights, objects=["Zebra"])) <= 1


def test_metadata_names_the_objects(weights: str) -> None:
    term = RewardConfig(name="numeracy", options={"weights": weights, "device": "cpu"})
    rewards = build_rewards([term])
    images, prompts = torch.rand(1, 3, 32, 32), ["a pair of zebras"]
    scores = [
        float(rewards.score(images, prompts, [{"objects": {"zebra": number}}]).total)
        for number in range(1, 17)
    ]
    assert sorted(scores) == [0.5] * 15 + [1.0]
    for wrong in (["zebra"], {"zebra": 0}, {"zebra": 2.0}, {"": 1}):
        with pytest.raises(RewardError, match=r"metadata objects: found .*, allowed: whole numbers above 0"):
            rewards.score(images, prompts, [{"objects": wrong}])


@pytest.mark.parametrize("objects", ["zebra", [3], [""]])
def test_objects_that_are_none(objects: object, weights: str, score: Score) -> None:
    with pytest.raises(ConfigError, match=r"objects: found .*, allowed: a list of nouns"):
        score("numeracy", torch.rand(1, 3, 32, 32), ["two dogs"], weights=weights, objects=objects)


def test_the_benchmarks_objects_have_plurals() -> None:
    irregular = {"knife": "knives", "man": "men", "butterfly": "butterflies", "toy": "toys", "fish": "fish"}
    for name, plural in irregular.items():
        assert counted_objects(f"three {plural}") == [(name, 3)]
    assert all(counted_objects(f"a {name}") == [(name, 1)] for name in OBJECTS)
    assert len(set(OBJECTS)) == len(OBJECTS) == 88
