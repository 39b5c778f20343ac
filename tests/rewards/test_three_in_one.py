"""The mean of several rewards for complex prompts, and what a prompt speaks of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError
from loopfast.rewards import build_rewards
from loopfast.rewards.models.three_in_one import prompt_aspects
from tests.tiny_models import write_blip, write_detector

Score = Callable[..., Tensor]

PROMPTS = [
    "The red circle was on top of the blue square.",
    "The green star sat next to the black bowl.",
    "The white car contrasted with the red bench.",
]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPTS[0], ("attribute", "spatial")),
        ("The black headphones were next to the green phone.", ("attribute", "spatial")),
        ("The fluffy cat is on the left of the soft pillow.", ("attribute", "spatial")),
        (PROMPTS[1], ("attribute", "spatial", "action")),
        ("The sleek black cat sat on top of the fluffy white pillow.", ("attribute", "spatial", "action")),
        (PROMPTS[2], ("attribute", "action")),
        ("The smooth white marble statue stood in front of the rough grey wall.", ("attribute", "action")),
        ("The nearby sun shone.", ("attribute", "action")),
    ],
)
def test_what_a_prompt_speaks_of(prompt: str, expected: tuple[str, ...]) -> None:
    assert prompt_aspects(prompt) == expected


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        "blip_vqa": {"weights": str(write_blip(folder / "blip")), "device": "cpu"},
        "spatial": {"weights": str(write_detector(folder / "detector")), "device": "cpu"},
        "clip_score": {"weights": str(clip_folder), "device": "cpu"},
    }


def three_in_one(
    options: dict[str, dict[str, str]], images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> Tensor:
    rewards = build_rewards([RewardConfig(name="three_in_one", options=options)])
    return rewards.score(images, prompts, metadata).total


def test_it_is_the_mean_of_what_the_prompt_speaks_of(
    options: dict[str, dict[str, str]], images: Tensor, score: Score
) -> None:
    images = images[:3]
    vqa = score("blip_vqa", images, PROMPTS, **options["blip_vqa"])
    clip = score("clip_score", images, PROMPTS, **options["clip_score"])
    place = score("spatial", images[:2], PROMPTS[:2], **options["spatial"])
    found = three_in_one(options, images, PROMPTS, [{}, {}, {}])
    expected = torch.stack(
        [(vqa[0] + place[0]) / 2, (vqa[1] + place[1] + clip[1]) / 3, (vqa[2] + clip[2]) / 2]
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_metadata_says_what_a_prompt_speaks_of(
    options: dict[str, dict[str, str]], images: Tensor, score: Score
) -> None:
    vqa = score("blip_vqa", images[:2], PROMPTS[1:], **options["blip_vqa"])
    place = score("spatial", images[:1], PROMPTS[1:2], **options["spatial"])
    aspects = {"aspects": ["attribute", "spatial"]}
    found = three_in_one(options, images[:2], PROMPTS[1:], [aspects, aspects])
    # the second has no relation that could be judged
    assert torch.allclose(found, torch.stack([(vqa[0] + place[0]) / 2, vqa[1] / 2]), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"blip_vqa": "large"}, "blip_vqa: found 'large', allowed: options by name"),
        ({"blip_vqa": {"weight": "x"}}, "blip_vqa: .*unexpected keyword argument 'weight'"),
        ({"spatial": {"weights": "./nowhere"}}, "'./nowhere' is not there"),
        ({"vqa": {}}, "does not take options"),
    ],
)
def test_wrong_options(given: dict[str, Any], reason: str, options: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_rewards([RewardConfig(name="three_in_one", options={**options, **given})], load=False)
