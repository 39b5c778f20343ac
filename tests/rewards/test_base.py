from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.embedded import detector
from loopfast.errors import ConfigError, RewardError
from loopfast.prompts import load_prompts
from loopfast.rewards import REWARDS, RewardSet, RewardTerm, build_rewards

MODULE = """
class Brightness:
    def __call__(self, images, prompts, metadata, scale=1.0):
        return images.mean((1, 2, 3)) * scale

brightness = Brightness()

def from_metadata(images, prompts, metadata):
    return [entry["value"] + len(prompt) for prompt, entry in zip(prompts, metadata)]

def images_only(images):
    return images.mean((1, 2, 3))

def factory():
    return brightness

class Scorer:
    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))

async def later(images, prompts, metadata):
    return images.mean((1, 2, 3))

def one_by_one(images, prompts, metadata):
    yield from images.mean((1, 2, 3))
"""
PROMPTS = ["a cat", "a dog", "a red circle"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, under a name that no other test has imported."""
    name = f"rewards_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return name


def images(count: int = 3, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def returning(value: Any) -> RewardSet:
    return RewardSet([RewardTerm("mine", lambda images, prompts, metadata: value)])


def test_total_is_the_weighted_sum_and_parts_are_unweighted() -> None:
    rewards = RewardSet(
        [
            RewardTerm("a", lambda *_: [1.0, 2.0, 3.0], weight=2.0),
            RewardTerm("b", lambda *_: torch.tensor([1, 1, 2]), weight=-1.0),
            RewardTerm("c", lambda *_: np.array([5.0, 6.0, 7.0]), weight=0.0),
        ]
    )
    scores = rewards.score(images(), PROMPTS)
    assert scores.total.tolist() == [1.0, 3.0, 4.0]
    assert scores.total.dtype == torch.float32
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "a": [1.0, 2.0, 3.0],
        "b": [1.0, 1.0, 2.0],
        "c": [5.0, 6.0, 7.0],
    }
    assert all(part.dtype == torch.float32 for part in scores.parts.values())


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        [True, False, True],
        [np.float32(1), torch.tensor(2.0), 3],
        np.array([1, 2, 3], dtype=np.int16),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
    ],
)
def test_tensor_array_or_list_of_numbers_is_accepted(value: Any) -> None:
    scores = returning(value).score(images(), PROMPTS)
    expected = [float(number.detach() if isinstance(number, Tensor) else number) for number in value]
    assert scores.total.tolist() == expected
    assert not scores.total.requires_grad


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (None, "None"),
        ("abc", "str"),
        (["1", "2", "3"], "list of str"),
        ([1.0, None, 3.0], "list of float, NoneType"),
        ([[1.0], [2.0], [3.0]], "list of list"),
        ({"avg": [1.0], "best": [1.0]}, "dict with the keys 'avg', 'best'"),
        ((torch.ones(3), {}), "tuple (Tensor, dict)"),
        (np.array(["a", "b", "c"]), "ndarray of <U1"),
        (np.array([1, None, 2]), "ndarray of object"),
        (torch.tensor([1j, 2, 3]), "Tensor of torch.complex64"),
        ((number for number in (1.0, 2.0, 3.0)), "generator"),
        (object(), "object"),
    ],
)
def test_wrong_type_is_reported_with_what_came_and_what_is_allowed(value: Any, described: str) -> None:
    with pytest.raises(RewardError) as caught:
        returning(value).score(images(), PROMPTS)
    assert str(caught.value) == (
        f"reward 'mine' returned {described}; allowed: a tensor, array or list of 3 number(s), one for each image"
    )
    assert caught.value.images_index == (0, 1, 2)


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ([1.0, 2.0], "2 number(s)"),
        ([], "0 number(s)"),
        (torch.ones(4), "4 number(s)"),
        (torch.ones(3, 1), "values of shape [3, 1]"),
        (torch.tensor(1.0), "a single number"),
        (1.5, "a single number"),
    ],
)
def test_wrong_number_of_values_is_reported(value: Any, described: str) -> None:
    with pytest.raises(RewardError, match=r"allowed: .* of 3 number") as caught:
        returning(value).score(images(), PROMPTS)
    assert str(caught.value).startswith(f"reward 'mine' returned {described}")
    assert caught.value.images_index == (0, 1, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_value_that_is_not_finite_is_reported_with_its_prompt(bad: float) -> None:
    with pytest.raises(RewardError) as caught:
        returning([1.0, bad, 2.0]).score(images(), PROMPTS)
    message = str(caught.value)
    assert message.startswith("reward 'mine' is not finite for 1 of 3 image(s): ")
    assert "'a dog'" in message
    assert "'a cat'" not in message
    assert caught.value.images_index == (1,)


def test_sum_that_overflows_is_reported() -> None:
    rewards = RewardSet([RewardTerm("big", lambda *_: [1e38, 0.0, 0.0], weight=1e38)])
    with pytest.raises(RewardError, match="the weighted sum of the rewards is not finite for 1 of 3"):
        rewards.score(images(), PROMPTS)


def test_reward_that_raises_is_reported_with_its_cause() -> None:
    def fails(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        raise KeyError("beauty")

    line = fails.__code__.co_firstlineno + 1
    with pytest.raises(RewardError) as caught:
        RewardSet([RewardTerm("mine", fails)]).score(images(), PROMPTS)
    assert str(caught.value) == f"reward 'mine' raised KeyError: 'beauty' (test_base.py, line {line})"
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.images_index == (0, 1, 2)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (
            ValueError("no [/b] tag\n\n  in " + 99 * "a long story "),
            "ValueError: no [/b] tag in a long story ",
        ),
    ],
)
def test_whatever_a_reward_raises_is_one_line(raised: BaseException, said: str) -> None:
    def fails(*_: Any) -> None:
        raise raised

    with pytest.raises(RewardError) as caught:
        RewardSet([RewardTerm("mine", fails)]).score(images(), PROMPTS)
    message = str(caught.value)
    assert message.startswith(f"reward 'mine' raised {said}")
    assert len(message) < 300
    assert "\n" not in message


def test_prompts_in_a_message_are_few_and_short_and_named_once() -> None:
    nan = returning([math.nan] * 8)
    with pytest.raises(RewardError, match=r"'prompt 0', 'prompt 1', 'prompt 2' and 5 more"):
        nan.score(images(8), [f"prompt {index}" for index in range(8)])
    with pytest.raises(RewardError, match=r"8 of 8 image\(s\): nan, nan, nan for prompts 'a cat', 'a dog'$"):
        nan.score(images(8), ["a cat", "a dog"] * 4)
    with pytest.raises(RewardError, match=r"prompts 'word word [word ]{,50}\.\.\.'$"):
        nan.score(images(8), ["word " * 1000] * 8)


def test_what_a_reward_changes_in_place_is_its_own() -> None:
    def changes(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        images.mul_(255)
        images.numpy()[:] += 1
        prompts.reverse()
        metadata[0]["category"] = "changed"
        metadata.clear()
        return images.mean((1, 2, 3))

    seen: list[Any] = []

    def looks(*arguments: Any) -> list[float]:
        seen.extend(arguments)
        return [0.0] * 3

    batch, metadata = images(), [{"category": "color"}] * 3
    before = batch.clone()
    rewards = RewardSet([RewardTerm("changes", changes), RewardTerm("looks", looks)])
    rewards.score(batch, PROMPTS, metadata)
    assert torch.equal(batch, before)
    assert torch.equal(seen[0], before)
    assert seen[1:] == [PROMPTS, metadata] == [PROMPTS, [{"category": "color"}] * 3]


def test_arguments_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images, 2 prompts and 3 metadata"):
        returning([1.0]).score(images(), PROMPTS[:2])
    with pytest.raises(ValueError, match="3 images, 3 prompts and 1 metadata"):
        returning([1.0]).score(images(), PROMPTS, [{}])


numbers = st.one_of(
    st.floats(), st.integers(-(10**400), 10**400), st.booleans(), st.none(), st.text(max_size=3)
)


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        numbers, st.lists(numbers, max_size=5), st.dictionaries(st.text(max_size=2), numbers, max_size=2)
    )
)
def test_whatever_a_reward_returns_is_scored_or_reported_by_name(value: Any) -> None:
    try:
        scores = returning(value).score(images(size=2), PROMPTS)
    except RewardError as error:
        named = "'mine'" in str(error)
    else:
        named = True
        assert scores.total.shape == (3,)
        assert scores.total.isfinite().all()
    assert named


def test_embedded_rewards_are_the_detectors() -> None:
    prompts = [prompt.text for prompt in load_prompts("embedded:color")[:4]]
    batch = images(4)
    rewards = build_rewards([RewardConfig(name="embedded"), RewardConfig(name="embedded_exact", weight=0.0)])
    scores = rewards.score(batch, prompts)
    assert torch.equal(scores.parts["embedded"], detector.score(batch, prompts).float())
    assert torch.equal(scores.parts["embedded_exact"], detector.exact(batch, prompts).float())
    assert torch.equal(scores.total, scores.parts["embedded"])


def test_embedded_reward_refuses_what_is_not_of_its_world() -> None:
    rewards = build_rewards([RewardConfig(name="embedded")])
    with pytest.raises(
        RewardError, match=r"'embedded' raised ValueError: .*shape \[3, 32, 32\], not \[3, 64, 64\]"
    ):
        rewards.score(images(size=64), PROMPTS)
    with pytest.raises(RewardError, match="'embedded' raised ValueError: 'a cat' is not a caption"):
        rewards.score(images(), PROMPTS)


@pytest.mark.parametrize("quality", [95, 30])
def test_jpeg_size_is_that_of_the_file(quality: int) -> None:
    batch = torch.stack([torch.full((3, 48, 64), 0.5), images(1, 64)[0, :, :48]])
    options = {} if quality == 95 else {"quality": quality}
    names = ("jpeg_compressibility", "jpeg_incompressibility")
    rewards = build_rewards([RewardConfig(name=name, options=options) for name in names])
    parts = rewards.score(batch, ["gray", "noise"]).parts
    expected = []
    for image in batch:
        file = io.BytesIO()
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        expected.append(len(file.getvalue()) / 1000)
    assert parts["jpeg_incompressibility"].tolist() == pytest.approx(expected)
    assert parts["jpeg_compressibility"].tolist() == pytest.approx([-size for size in expected])
    assert expected[1] > expected[0]


def test_user_reward_takes_images_prompts_metadata_and_options(module: str) -> None:
    rewards = build_rewards(
        [
            RewardConfig(name=f"{module}:brightness", options={"scale": 10.0}),
            RewardConfig(name=f"{module}:from_metadata"),
        ]
    )
    batch = images()
    scores = rewards.score(batch, PROMPTS, [{"value": 1.0}, {"value": 2.0}, {"value": 3.0}])
    assert torch.allclose(scores.parts[f"{module}:brightness"], batch.mean((1, 2, 3)) * 10)
    assert scores.parts[f"{module}:from_metadata"].tolist() == [6.0, 7.0, 15.0]


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        ("absent", {}, "'absent' does not exist in"),
        ("images_only", {}, "cannot be called with (images, prompts, metadata)"),
        ("brightness", {"size": 3}, "cannot be called with (images, prompts, metadata, size=...)"),
        ("brightness", {"images": 3}, "cannot be called with"),
        ("factory", {}, "which takes (), cannot be called with (images, prompts, metadata): "),
        (
            "Scorer",
            {},
            "is a class and not an object of it; allowed: a function or object that takes images, ",
        ),
        ("later", {}, "is an async function; allowed: "),
        ("one_by_one", {}, "is a generator; allowed: "),
    ],
)
def test_unusable_user_reward_is_reported_by_name(
    module: str, function: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_rewards([RewardConfig(name=f"{module}:{function}", options=options)])
    assert f"'{module}:{function}'" in str(caught.value)
    assert reason in str(caught.value)


def test_function_without_a_signature_is_reported_when_it_fails() -> None:
    rewards = build_rewards([RewardConfig(name="builtins:max")])
    with pytest.raises(RewardError, match="'builtins:max' raised TypeError"):
        rewards.score(images(), PROMPTS)


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        (
            RewardConfig(name="embeded"),
            "no reward 'embeded'; nearest: 'embedded'; allowed: " + ", ".join(REWARDS),
        ),
        (RewardConfig(name="my-rewards:reward"), "no reward 'my-rewards:reward'"),
        (RewardConfig(name="no_such_module:reward"), "No module named 'no_such_module'"),
        (
            RewardConfig(name="embedded", options={"size": 3}),
            "reward 'embedded' does not take options {'size': 3}",
        ),
        (RewardConfig(name="jpeg_compressibility", options={"quality": 101}), "quality: found 101"),
        (RewardConfig(name="jpeg_compressibility", options={"quality": "high"}), "quality: found 'high'"),
    ],
)
def test_unusable_reward_is_reported_by_name(term: RewardConfig, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_rewards([term])
    assert term.name in str(caught.value)
    assert reason in str(caught.value)
