from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipImageProcessor, CLIPImageProcessor

from loopfast.errors import ConfigError
from loopfast.rewards.models.preprocessing import ImagePreprocessing, load_preprocessing
from loopfast.rewards.models.weights import Source

# of a value in [0, 1] to 8 bits, over the smallest of CLIP's deviations; of the picture, and in each pass of resizing
ROUNDING = 0.5 / 255 / 0.26


@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (64, 64), (24, 30), (32, 32)])
@pytest.mark.parametrize("resample", [2, 3])
def test_agrees_with_clips_processor(
    tmp_path: Path, as_pictures: Callable[[Tensor], list[Any]], shape: tuple[int, int], resample: int
) -> None:
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=resample
    )
    processor.save_pretrained(tmp_path)
    images = torch.rand(2, 3, *shape)
    expected = processor(as_pictures(images), return_tensors="pt")["pixel_values"]
    found = load_preprocessing(Source("aesthetic", "weights", str(tmp_path)))(images)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape == (2, 3, 32, 32)
    assert (found - expected).abs().max() < 3 * ROUNDING
    assert (found - expected).abs().mean() < ROUNDING
    assert expected.std() > 30 * ROUNDING


def test_agrees_with_blips_processor(tmp_path: Path, as_pictures: Callable[[Tensor], list[Any]]) -> None:
    processor = BlipImageProcessor(size={"height": 24, "width": 32})
    processor.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 40, 48)
    expected = processor(as_pictures(images), return_tensors="pt")["pixel_values"]
    found = load_preprocessing(Source("blip_vqa", "weights", str(tmp_path)), kind="BLIP")(images)
    assert found.shape == expected.shape == (2, 3, 24, 32)
    assert (found - expected).abs().max() < 3 * ROUNDING


def test_old_files_give_sizes_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224, "crop_size": 224, "resample": 3}')
    found = load_preprocessing(Source("aesthetic", "weights", str(tmp_path)))
    assert (found.resize, found.crop) == (224, (224, 224))
    assert load_preprocessing(Source("blip_vqa", "weights", str(tmp_path)), kind="BLIP").resize == (224, 224)


def test_images_are_not_changed_in_place() -> None:
    images = torch.rand(1, 3, 32, 32)
    before = images.clone()
    ImagePreprocessing(32, (32, 32), (0.5,) * 3, (0.5,) * 3)(images)
    assert torch.equal(images, before)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[16, 20\] pixels are smaller than \[32, 32\]"):
        ImagePreprocessing(None, (32, 32), (0.5,) * 3, (0.5,) * 3)(torch.rand(1, 3, 16, 20))


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ('{"resample": 0}', "resample: found 0, allowed: 2 (bilinear), 3 (bicubic)"),
        ('{"do_normalize": false}', "do_normalize or do_rescale: false"),
        ("{", "cannot be loaded"),
        (None, "cannot be loaded"),
    ],
)
def test_unusable_processor_is_named(tmp_path: Path, document: str | None, reason: str) -> None:
    if document is not None:
        (tmp_path / "preprocessor_config.json").write_text(document)
    with pytest.raises(ConfigError) as caught:
        load_preprocessing(Source("aesthetic", "weights", str(tmp_path)))
    assert f"reward 'aesthetic': the image processor of {str(tmp_path)!r}" in str(caught.value)
    assert reason in str(caught.value)
