from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel

from loopfast.errors import ConfigError
from loopfast.rewards.models.aesthetic import ScoreHead

Score = Callable[..., Tensor]
WIDTH = 24  # of the small model's embeddings
PUBLISHED = {
    "layers.0.weight": (1024, 768),
    "layers.0.bias": (1024,),
    "layers.2.weight": (128, 1024),
    "layers.2.bias": (128,),
    "layers.4.weight": (64, 128),
    "layers.4.bias": (64,),
    "layers.6.weight": (16, 64),
    "layers.6.bias": (16,),
    "layers.7.weight": (1, 16),
    "layers.7.bias": (1,),
}


class PublishedHead(nn.Module):
    """As the authors wrote it, for the small model's embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)


@pytest.fixture(scope="module")
def published() -> PublishedHead:
    torch.manual_seed(3)
    head = PublishedHead().eval()
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return head


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory, published: PublishedHead) -> str:
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(published.state_dict(), path)
    return str(path)


def test_head_has_the_published_names_and_shapes() -> None:
    assert {name: tuple(value.shape) for name, value in ScoreHead().state_dict().items()} == PUBLISHED


def test_agrees_with_the_authors_way(
    score: Score,
    clip_folder: Path,
    head_file: str,
    published: PublishedHead,
    exact_images: Tensor,
    prompts: list[str],
    as_pictures: Callable[[Tensor], list[Any]],
) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        pixels = processor(as_pictures(exact_images), return_tensors="pt")["pixel_values"]
        embeddings = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        expected = published(embeddings / embeddings.norm(dim=-1, keepdim=True)).squeeze(1)
    found = score("aesthetic", exact_images, prompts, weights=str(clip_folder), head=head_file)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.argsort().tolist() == expected.argsort().tolist()
    assert expected.std() > 0.05


def test_depends_on_the_image_alone(
    score: Score, clip_folder: Path, head_file: str, images: Tensor, prompts: list[str]
) -> None:
    options = {"weights": str(clip_folder), "head": head_file}
    one, two, five = (score("aesthetic", images, prompts, **options, batch_size=size) for size in (1, 2, 5))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, five, atol=1e-5, rtol=0)
    reversed_prompts = score("aesthetic", images, prompts[::-1], **options, batch_size=5)
    torch.testing.assert_close(reversed_prompts, five, atol=1e-5, rtol=0)


def test_half_precision_is_close(
    score: Score, clip_folder: Path, head_file: str, images: Tensor, prompts: list[str]
) -> None:
    options = {"weights": str(clip_folder), "head": head_file}
    whole = score("aesthetic", images, prompts, **options)
    half = score("aesthetic", images, prompts, **options, dtype="float16")
    torch.testing.assert_close(half, whole, atol=0.01, rtol=0)
    assert not torch.equal(half, whole)


def test_head_may_be_safetensors(
    score: Score,
    clip_folder: Path,
    head_file: str,
    published: PublishedHead,
    images: Tensor,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    save_file(published.state_dict(), tmp_path / "head.safetensors")
    found = score(
        "aesthetic", images, prompts, weights=str(clip_folder), head=str(tmp_path / "head.safetensors")
    )
    pickled = score("aesthetic", images, prompts, weights=str(clip_folder), head=head_file)
    torch.testing.assert_close(found, pickled, atol=1e-5, rtol=0)


def test_another_head_is_named(
    score: Score,
    clip_folder: Path,
    published: PublishedHead,
    images: Tensor,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    path = tmp_path / "head.pth"
    state = published.state_dict()
    cases = [
        ({**state, "layers.0.weight": torch.ones(1024, 768)}, "found shape [1024, 768], expected [1024, 24]"),
        ({name: value for name, value in state.items() if "7" not in name}, "without layers.7.bias"),
        ({f"mlp.{name}": value for name, value in state.items()}, "with mlp.layers.0.bias"),
    ]
    for found, reason in cases:
        torch.save(found, path)
        with pytest.raises(ConfigError) as caught:
            score("aesthetic", images, prompts, weights=str(clip_folder), head=str(path))
        assert f"reward 'aesthetic': head {str(path)!r}" in str(caught.value)
        assert reason in str(caught.value)
    with pytest.raises(ConfigError, match=r"reward 'aesthetic': head: '.*absent.pth' is not there"):
        score("aesthetic", images, prompts, weights=str(clip_folder), head=str(tmp_path / "absent.pth"))
