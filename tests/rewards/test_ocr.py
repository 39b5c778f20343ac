"""`ocr`: what a prompt wants to be read, how far what was read is from it, and reading for real where RapidOCR is."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError, RewardError
from loopfast.rewards import build_rewards
from loopfast.rewards.models.ocr import similarity, wanted_text

READS = (
    importlib.util.find_spec("rapidocr") is not None and importlib.util.find_spec("onnxruntime") is not None
)
reading = pytest.mark.skipif(not READS, reason="needs the extra ocr: rapidocr and onnxruntime")


@pytest.mark.parametrize(
    ("prompt", "metadata", "wanted"),
    [
        ('a sign that says "Open Now" on a door', {}, "Open Now"),
        ('"first" and "second"', {}, "first"),
        ("a sign that says “Open Now”", {}, "Open Now"),
        ("a sign", {"text": "Closed"}, "Closed"),
        ('a sign that says "Open"', {"text": "Closed"}, "Closed"),
    ],
)
def test_the_text_is_quoted_or_in_the_metadata(prompt: str, metadata: dict[str, Any], wanted: str) -> None:
    assert wanted_text(prompt, metadata) == wanted


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a sign", {}),
        ('a sign that says "Open', {}),
        ('a sign that says ""', {}),
        ('a sign that says " "', {}),
        ("a sign", {"text": ""}),
        ('a sign that says "Open"', {"text": 7}),
    ],
)
def test_a_prompt_without_text_is_named(prompt: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match="expected: the text that the image should show") as caught:
        wanted_text(prompt, metadata)
    assert repr(prompt) in str(caught.value)


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ("Hello World", "hello world", 1.0),
        ("HELLO\nWORLD", "Hello World", 1.0),
        ("say hello world twice", "Hello World", 1.0),
        ("helo world", "Hello World", 0.9),
        ("hexlo world", "Hello World", 0.9),
        ("kitten", "sitting", 1 - 3 / 7),
        ("", "open", 0.0),
        ("a very long other text", "open", 0.0),
    ],
)
def test_similarity_is_one_less_the_share_of_edits(found: str, wanted: str, expected: float) -> None:
    assert similarity(found, wanted) == pytest.approx(expected)


def edits(first: str, second: str) -> int:
    """Levenshtein's distance by its recursive definition."""
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return edits(first[1:], second[1:])
    return 1 + min(edits(first[1:], second), edits(first, second[1:]), edits(first[1:], second[1:]))


@given(st.text("abc", max_size=5), st.text("abc", min_size=1, max_size=5))
def test_similarity_counts_the_fewest_edits(found: str, wanted: str) -> None:
    expected = 1.0 if wanted in found else max(0.0, 1 - edits(found, wanted) / len(wanted))
    assert similarity(found, wanted) == pytest.approx(expected)


@pytest.mark.skipif(READS, reason="the extra ocr is installed")
def test_without_the_package_the_extra_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"reward 'ocr' needs the extra 'ocr' .* pip install 'loopfast\[ocr\]'"
    ):
        build_rewards([RewardConfig(name="ocr")])


def test_a_folder_without_models_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights: './nowhere' is no folder"):
        build_rewards([RewardConfig(name="ocr", options={"weights": "./nowhere"})])
    for name in ("a_det.onnx", "b_rec.onnx", "c_rec.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"\*rec\*.onnx: found b_rec.onnx, c_rec.onnx, expected: one file"):
        build_rewards([RewardConfig(name="ocr", options={"weights": str(tmp_path)})])


def picture(text: str) -> Tensor:
    """Black letters on a yellow ground, float32 ``[3, 128, 256]``."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (256, 128), (255, 220, 120))
    ImageDraw.Draw(image).text((16, 8), text, fill="black", font=ImageFont.load_default(36))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@reading
def test_rendered_text_is_read() -> None:
    texts = ["OPEN NOW", "Fresh\nbread", ""]
    images = torch.stack([picture(text) for text in texts])
    rewards = build_rewards([RewardConfig(name="ocr")])
    right = rewards.score(images, ['a sign "open now"', 'a sign "Fresh Bread"', 'a sign "shop"']).total
    assert right.tolist() == [1.0, 1.0, 0.0]
    wrong = rewards.score(images, ['a sign "open new"', 'a sign "Fresh Bread" on it', 'a sign "x"']).total
    assert wrong[0] == pytest.approx(1 - 1 / 7)
    assert wrong.tolist()[1:] == [1.0, 0.0]
    with pytest.raises(RewardError, match="prompt 'a sign': text between double quotes"):
        rewards.score(images[:1], ["a sign"])
    assert rewards.score(images[:1], ["a sign"], [{"text": "open now"}]).total.tolist() == [1.0]


@reading
def test_models_are_read_from_a_folder(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("rapidocr")
    assert spec is not None
    assert spec.origin is not None
    for part in ("det", "rec"):
        (model,) = (Path(spec.origin).parent / "models").glob(f"*{part}*.onnx")
        shutil.copy(model, tmp_path / f"{part}.onnx")
    rewards = build_rewards([RewardConfig(name="ocr", options={"weights": str(tmp_path)})])
    assert rewards.score(picture("OPEN")[None], ['"open"']).total.tolist() == [1.0]
