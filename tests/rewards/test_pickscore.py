from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from loopfast.errors import ConfigError

Score = Callable[..., Tensor]


def test_is_the_models_logit(score: Score, clip_folder: Path, images: Tensor, prompts: list[str]) -> None:
    similarity = score("clip_score", images, prompts, weights=str(clip_folder))
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    found = score("pickscore", images, prompts, weights=str(clip_folder))
    torch.testing.assert_close(found, scale * similarity)
    assert scale > 2
    smaller = score("pickscore", images, prompts, weights=str(clip_folder), scale=1 / 26, batch_size=2)
    torch.testing.assert_close(smaller, found / 26, atol=1e-5, rtol=0)


def test_logit_scale_is_not_rounded_with_the_model(
    score: Score, clip_folder: Path, images: Tensor, prompts: list[str]
) -> None:
    options = {"weights": str(clip_folder), "dtype": "float16"}
    similarity = score("clip_score", images, prompts, **options)
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    torch.testing.assert_close(
        score("pickscore", images, prompts, **options), scale * similarity, rtol=1e-5, atol=0
    )


def test_processor_may_lie_elsewhere(
    score: Score, clip_folder: Path, images: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    weights, processor = tmp_path / "weights", tmp_path / "processor"
    for folder, names in (
        (weights, ["config.json", "model.safetensors"]),
        (processor, ["preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"]),
    ):
        folder.mkdir()
        for name in names:
            shutil.copy(clip_folder / name, folder / name)
    found = score("pickscore", images, prompts, weights=str(weights), processor=str(processor))
    together = score("pickscore", images, prompts, weights=str(clip_folder))
    torch.testing.assert_close(found, together, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"reward 'pickscore': processor: .*no preprocessor_config.json"):
        score("pickscore", images, prompts, weights=str(weights), processor=str(weights))
