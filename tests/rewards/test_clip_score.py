from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from loopfast.errors import ConfigError

Score = Callable[..., Tensor]


@pytest.fixture(scope="module")
def expected(
    clip_folder: Path, exact_images: Tensor, prompts: list[str], as_pictures: Callable[[Tensor], list[Any]]
) -> Tensor:
    """From transformers' own processor and model, one image at a time."""
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    scores = []
    for picture, prompt in zip(as_pictures(exact_images), prompts, strict=True):
        pixels = processor([picture], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = model(**tokenizer([prompt], return_tensors="pt"), pixel_values=pixels).logits_per_image
        scores.append(logits[0, 0] / model.logit_scale.exp())
    return torch.stack(scores).detach()


def test_is_the_models_cosine_similarity(
    score: Score, clip_folder: Path, exact_images: Tensor, prompts: list[str], expected: Tensor
) -> None:
    found = score("clip_score", exact_images, prompts, weights=str(clip_folder))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.argsort().tolist() == expected.argsort().tolist()
    assert expected.std() > 0.05


def test_does_not_depend_on_the_batch(
    score: Score, clip_folder: Path, images: Tensor, prompts: list[str]
) -> None:
    one, two, five = (
        score("clip_score", images, prompts, weights=str(clip_folder), batch_size=size) for size in (1, 2, 5)
    )
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, five, atol=1e-5, rtol=0)
    order = [3, 0, 4, 1, 2]
    shuffled = score(
        "clip_score", images[order], [prompts[row] for row in order], weights=str(clip_folder), batch_size=2
    )
    torch.testing.assert_close(shuffled, one[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close(
    score: Score, clip_folder: Path, images: Tensor, prompts: list[str], dtype: str
) -> None:
    whole = score("clip_score", images[:2], prompts[:2], weights=str(clip_folder))
    half = score("clip_score", images[:2], prompts[:2], weights=str(clip_folder), dtype=dtype)
    torch.testing.assert_close(half, whole, atol=0.03, rtol=0)
    assert not torch.equal(half, whole)


def test_scale_is_a_factor(score: Score, clip_folder: Path, images: Tensor, prompts: list[str]) -> None:
    plain = score("clip_score", images[:2], prompts[:2], weights=str(clip_folder))
    scaled = score("clip_score", images[:2], prompts[:2], weights=str(clip_folder), scale=100)
    torch.testing.assert_close(scaled, 100 * plain)


def test_long_prompts_are_cut(score: Score, clip_folder: Path, images: Tensor) -> None:
    start = "a red circle and a blue square and a green star and"
    first, second, other = score(
        "clip_score",
        images[:1].expand(3, -1, -1, -1),
        [f"{start} a red star {'above ' * 20}", f"{start} a red star {'below ' * 20}", "a circle"],
        weights=str(clip_folder),
    )
    # rows of a call may be rounded differently
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert (first - other).abs() > 1e-4


def test_missing_parts_are_named(score: Score, clip_folder: Path, images: Tensor, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reward 'clip_score': the image processor of .* cannot be loaded"):
        score("clip_score", images, ["a"] * 5, weights=str(tmp_path))
    CLIPImageProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reward 'clip_score': cannot load the tokenizer of"):
        score("clip_score", images, ["a"] * 5, weights=str(tmp_path))


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(
    score: Score, clip_folder: Path, images: Tensor, prompts: list[str], tf32: Callable[[bool], None]
) -> None:
    tf32(False)
    on_cpu = score("clip_score", images, prompts, weights=str(clip_folder))
    on_gpu = score("clip_score", images.cuda(), prompts, weights=str(clip_folder), device="cuda")
    # float32 differs from float64 by 2e-7 here, and from a convolution in TF32 by 2e-4
    torch.testing.assert_close(on_gpu, on_cpu, atol=5e-5, rtol=0)
    assert on_cpu.std() > 0.05
