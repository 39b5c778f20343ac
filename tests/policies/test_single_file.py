"""Models from one file in the layout of their authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies import load_policy
from loopfast.policies.single_file import _read
from tests.original_layout import save_single_file
from tests.policies.test_families import settings

WHOLE = ("vae", "text_encoder")


@pytest.mark.parametrize(
    ("name", "parts"), [("a.safetensors", WHOLE), ("a.ckpt", WHOLE), ("unet.safetensors", ())]
)
def test_the_weights_are_those_of_the_file(
    name: str, parts: tuple[str, ...], family_folder: Any, tmp_path: Path
) -> None:
    """Components that the file lacks come from the pipeline that describes it."""
    folder = family_folder("sd")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():  # so that it shows which of the two was loaded
        for part in ("unet", *parts):
            for value in getattr(pipeline, part).parameters():
                value += 0.5
    file = save_single_file(pipeline, tmp_path / name, parts=parts)
    config = settings(file, "full", config=str(folder), allow_pickle=name.endswith(".ckpt"))
    policy: Any = load_policy(config)
    for part in ("unet", *WHOLE):
        found = getattr(policy.pipeline, part).state_dict()
        for key, value in getattr(pipeline, part).state_dict().items():
            assert torch.equal(found[key], value), (part, key)


def test_a_single_file_without_its_text_encoder_is_exported_with_it(
    family_folder: Any, tmp_path: Path
) -> None:
    folder = family_folder("sd")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipeline.text_encoder.embeddings.token_embedding.weight += 1
    file = save_single_file(pipeline, tmp_path / "a.safetensors")
    policy = load_policy(settings(file, "full", config=str(folder)))
    policy.free_text_encoder(["a red circle"])
    policy.export(tmp_path / "whole", {name: p.detach() for name, p in policy.trainable().items()})
    found = DiffusionPipeline.from_pretrained(tmp_path / "whole").text_encoder.state_dict()
    for key, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_types_of_a_single_file(dtype: str, family_folder: Any, tmp_path: Path) -> None:
    folder = family_folder("sd")
    file = save_single_file(
        DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16), tmp_path / "a.safetensors"
    )
    for tune, denoiser in (("lora", getattr(torch, dtype)), ("full", torch.float32)):
        policy: Any = load_policy(settings(file, tune, config=str(folder), dtype=dtype))
        assert policy.pipeline.unet.conv_in.weight.dtype == denoiser
        assert policy.pipeline.vae.dtype == torch.float32
        assert policy.pipeline.text_encoder.dtype == policy.dtype


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.out.2.bias", "lacks tensors of the pipeline"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias",
            r"lacks 1 tensor\(s\) of the text_encoder .* such as encoder\.layers\.1\.mlp\.fc2\.bias",
        ),
    ],
)
def test_a_file_that_lacks_tensors(name: str, said: str, family_folder: Any, tmp_path: Path) -> None:
    folder = family_folder("sd")
    file = save_single_file(DiffusionPipeline.from_pretrained(folder), tmp_path / "a.safetensors")
    found = load_file(file)
    del found[name]
    save_file(found, file)
    _read.cache_clear()
    with pytest.raises(ConfigError, match=rf"^model\.pretrained: .*{said}"):
        load_policy(settings(file, config=str(folder)))


def test_a_description_of_another_model(family_folder: Any, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(family_folder("sd"))
    file = save_single_file(pipeline, tmp_path / "a.safetensors")
    for other in ("sdxl", "pixart"):
        with pytest.raises(ConfigError, match=r"^model\.pretrained: ") as error:
            load_policy(settings(file, config=str(family_folder(other))))
        assert "\n" not in str(error.value)


def test_a_program_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    trap = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})"

    class Program:
        def __reduce__(self) -> Any:
            return exec, (trap,)

    torch.save({"state_dict": {"model.diffusion_model.x": Program()}}, tmp_path / "a.ckpt")
    config = ModelConfig(
        pretrained=str(tmp_path / "a.ckpt"), config="embedded", allow_pickle=True, device="cpu"
    )
    with pytest.raises(ConfigError, match=r"a\.ckpt' cannot be read: Weights only load failed"):
        load_policy(config)
    assert not (tmp_path / "ran").exists()
