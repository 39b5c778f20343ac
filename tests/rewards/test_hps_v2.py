from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from loopfast.errors import ConfigError
from loopfast.rewards.models.hps_v2 import from_open_clip

Score = Callable[..., Tensor]


def open_clip_state(model: CLIPModel) -> dict[str, Tensor]:
    """The model's weights under the names that open_clip gives those of its ViT-H-14."""
    ours = dict(model.state_dict())
    state = {
        "logit_scale": ours["logit_scale"],
        "text_projection": ours["text_projection.weight"].T,
        "positional_embedding": ours["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": ours["text_model.embeddings.token_embedding.weight"],
        "visual.proj": ours["visual_projection.weight"].T,
        "visual.class_embedding": ours["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": ours["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": ours["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = ours[f"text_model.final_layer_norm.{kind}"]
        state[f"visual.ln_pre.{kind}"] = ours[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = ours[f"vision_model.post_layernorm.{kind}"]
        for prefix, stem in (("", "text_model"), ("visual.", "vision_model")):
            for layer in range(2):
                theirs = f"{prefix}transformer.resblocks.{layer}"
                our = f"{stem}.encoder.layers.{layer}"
                parts = [ours[f"{our}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                state[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
                state[f"{theirs}.attn.out_proj.{kind}"] = ours[f"{our}.self_attn.out_proj.{kind}"]
                state[f"{theirs}.ln_1.{kind}"] = ours[f"{our}.layer_norm1.{kind}"]
                state[f"{theirs}.ln_2.{kind}"] = ours[f"{our}.layer_norm2.{kind}"]
                state[f"{theirs}.mlp.c_fc.{kind}"] = ours[f"{our}.mlp.fc1.{kind}"]
                state[f"{theirs}.mlp.c_proj.{kind}"] = ours[f"{our}.mlp.fc2.{kind}"]
    return state


@pytest.fixture(scope="module")
def model(clip_folder: Path) -> CLIPModel:
    """Another one than `clip_folder`'s."""
    model = CLIPModel.from_pretrained(clip_folder)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: CLIPModel) -> str:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 4, "state_dict": open_clip_state(model)}, path)
    return str(path)


def test_every_weight_finds_its_place(model: CLIPModel) -> None:
    theirs = open_clip_state(model)
    converted = from_open_clip(theirs)
    ours = model.state_dict()
    assert converted.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(converted[name], value), name


def test_is_the_converted_models_similarity(
    score: Score,
    clip_folder: Path,
    checkpoint: str,
    model: CLIPModel,
    images: Tensor,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    found = score("hps_v2", images, prompts, weights=checkpoint, processor=str(clip_folder))
    model.save_pretrained(tmp_path)
    # the same model in transformers' form
    expected = score("hps_v2", images, prompts, weights=str(tmp_path), processor=str(clip_folder))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.05
    assert not torch.allclose(
        found, score("clip_score", images, prompts, weights=str(clip_folder)), atol=0.01
    )
    scaled = score(
        "hps_v2", images, prompts, weights=checkpoint, processor=str(clip_folder), scale=100, batch_size=1
    )
    torch.testing.assert_close(scaled, 100 * expected, atol=1e-3, rtol=0)


def test_another_file_is_named(
    score: Score, clip_folder: Path, model: CLIPModel, images: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "hps.pt"
    state = open_clip_state(model)
    cases = [
        ({"weight": torch.ones(1)}, "is no CLIP model of open_clip: without visual.proj"),
        ({**state, "visual.attn_pool.weight": torch.ones(1)}, "with visual.attn_pool.weight"),
        (
            {name: value for name, value in state.items() if name != "ln_final.bias"},
            "without text_model.final_layer_norm.bias",
        ),
        (
            {**state, "visual.conv1.weight": torch.ones(32, 3, 14, 14)},
            "expected [32, 3, 8, 8]",
        ),
    ]
    for found, reason in cases:
        torch.save(found, path)
        with pytest.raises(ConfigError) as caught:
            score("hps_v2", images, prompts, weights=str(path), processor=str(clip_folder))
        assert f"reward 'hps_v2': weights {str(path)!r}" in str(caught.value)
        assert reason in str(caught.value)
    with pytest.raises(ConfigError, match=r"reward 'hps_v2': weights: '\./absent\.pt' is not there"):
        score("hps_v2", images, prompts, weights="./absent.pt", processor=str(clip_folder))
