from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipImageProcessor,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from loopfast.errors import ConfigError
from loopfast.rewards.models.aesthetic import ScoreHead

Score = Callable[..., Tensor]
Parts = tuple[BlipVisionModel, BlipTextModel, ScoreHead]


def published_state(parts: Parts) -> dict[str, Tensor]:
    """The weights under the names of the published file, with what it holds besides."""
    vision, text, head = parts
    state = {f"mlp.{name}": value for name, value in head.state_dict().items()}
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    state |= {"blip.vision_proj.weight": torch.ones(256, 128), "blip.text_proj.bias": torch.ones(256)}
    ours = vision.state_dict()
    theirs = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
        "norm.weight": "post_layernorm.weight",
        "norm.bias": "post_layernorm.bias",
    }
    for layer in range(2):
        for kind in ("weight", "bias"):
            for their, our in (
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("attn.qkv", "self_attn.qkv"),
                ("attn.proj", "self_attn.projection"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                theirs[f"blocks.{layer}.{their}.{kind}"] = f"encoder.layers.{layer}.{our}.{kind}"
    return state | {f"blip.visual_encoder.{their}": ours[our] for their, our in theirs.items()}


@pytest.fixture(scope="module")
def parts(bert_tokenizer_folder: Path) -> Parts:
    """BLIP's vision and text models with two heads of 64 and one, and the head of the score."""
    torch.manual_seed(2)
    vocabulary = len((bert_tokenizer_folder / "vocab.txt").read_text().split())
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            encoder_hidden_size=128,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=40,
        ),
        add_pooling_layer=False,
    )
    head = ScoreHead(64)
    for module in (vision, text, head):
        module.eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=0.1 * (parameter.ndim == 1), std=0.4)
    for layer in head.layers.values():
        nn.init.normal_(layer.weight, std=1.6 * layer.in_features**-0.5)
    return vision, text, head


@pytest.fixture(scope="module")
def options(
    tmp_path_factory: pytest.TempPathFactory, parts: Parts, bert_tokenizer_folder: Path
) -> dict[str, str]:
    path = tmp_path_factory.mktemp("image-reward") / "ImageReward.pt"
    torch.save(published_state(parts), path)
    return {"weights": str(path), "tokenizer": str(bert_tokenizer_folder)}


def test_agrees_with_the_authors_way(
    score: Score,
    options: dict[str, str],
    parts: Parts,
    exact_images: Tensor,
    prompts: list[str],
    as_pictures: Callable[[Tensor], list[Any]],
) -> None:
    vision, text, head = parts
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    expected = []
    with torch.no_grad():
        for picture, prompt in zip(as_pictures(exact_images), prompts, strict=True):
            pixels = processor([picture], return_tensors="pt")["pixel_values"]
            tokens = tokenizer([prompt], padding="max_length", max_length=35, return_tensors="pt")
            seen = vision(pixel_values=pixels).last_hidden_state
            read = text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
            ).last_hidden_state
            expected.append((head(read[:, 0]) - 0.16717362830052426) / 1.0333394966054072)
    wanted = torch.cat(expected)
    found = score("image_reward", exact_images, prompts, **options)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert found.argsort().tolist() == wanted.argsort().tolist()
    assert wanted.std() > 0.1


def test_depends_on_image_and_prompt(
    score: Score, options: dict[str, str], images: Tensor, prompts: list[str]
) -> None:
    same_prompt = score("image_reward", images, prompts[:1] * 5, **options)
    same_image = score("image_reward", images[:1].expand(5, -1, -1, -1), prompts, **options)
    assert len(set(same_prompt.tolist())) == len(set(same_image.tolist())) == 5


def test_does_not_depend_on_the_batch(
    score: Score, options: dict[str, str], images: Tensor, prompts: list[str]
) -> None:
    one, two, five = (
        score("image_reward", images, prompts, **options, batch_size=size) for size in (1, 2, 5)
    )
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one, five, atol=1e-5, rtol=1e-5)


def test_half_precision_is_close(
    score: Score, options: dict[str, str], images: Tensor, prompts: list[str]
) -> None:
    whole = score("image_reward", images, prompts, **options)
    half = score("image_reward", images, prompts, **options, dtype="float16")
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0)
    assert not torch.equal(half, whole)


def test_long_prompts_are_cut_after_35_tokens(score: Score, options: dict[str, str], images: Tensor) -> None:
    start = "red circle " * 17
    first, second, other = score(
        "image_reward",
        images[:1].expand(3, -1, -1, -1),
        [f"{start}blue", f"{start}green star", "red circle " * 16],
        **options,
    )
    # rows of a call may be rounded differently
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert (first - other).abs() > 1e-4


def test_another_file_is_named(
    score: Score, options: dict[str, str], parts: Parts, images: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "other.pt"
    state = published_state(parts)
    text_bias = "blip.text_encoder.encoder.layer.1.output.dense.bias"
    cases = [
        ({"weight": torch.ones(1)}, "is no ImageReward: without embeddings.patch_embedding.weight"),
        (
            {name: value for name, value in state.items() if name != text_bias},
            "without encoder.layer.1.output",
        ),
        ({**state, "blip.visual_encoder.head.bias": torch.ones(1)}, "with head.bias, which it does not have"),
        (
            {name: value for name, value in state.items() if not name.startswith("mlp.")},
            "without layers.0.bias",
        ),
        (
            {**state, "mlp.layers.0.weight": torch.ones(1024, 768)},
            "layers.0.weight: found shape [1024, 768], expected [1024, 64]",
        ),
    ]
    for found, reason in cases:
        torch.save(found, path)
        with pytest.raises(ConfigError) as caught:
            score("image_reward", images, prompts, weights=str(path), tokenizer=options["tokenizer"])
        assert f"reward 'image_reward': weights {str(path)!r}" in str(caught.value)
        assert reason in str(caught.value)
