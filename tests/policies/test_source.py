"""The values that ``model.pretrained`` may have, and the errors of all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies import check_model, load_family
from loopfast.policies.source import find_source

Make = Callable[[Path], Path]


def config(pretrained: object, **options: Any) -> ModelConfig:
    return ModelConfig(pretrained=str(pretrained), **options)


def write(file: Path, content: str = "{}") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def tensors(file: Path, *names: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(1, 1) for name in names}, file)
    return file


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def part(folder: Path) -> Path:
    write(folder / "model_index.json")
    return write(folder / "unet" / "config.json", '{"_class_name": "UNet2DConditionModel"}').parent


def text_encoder(folder: Path) -> Path:
    return write(folder / "text_encoder" / "config.json", '{"architectures": ["CLIPTextModel"]}').parent


def lora(folder: Path) -> Path:
    return tensors(folder / "lora" / "pytorch_lora_weights.safetensors", "unet.a.lora_A.weight").parent


def run(folder: Path, *, trained: str = "") -> Path:
    write(folder / "run" / "config.yaml")
    (folder / "run" / "checkpoints").mkdir()
    if trained == "model":
        write(folder / "run" / "model" / "model_index.json")
    if trained == "lora":
        lora(folder / "run")
    return folder / "run"


def cached(folder: Path) -> Path:
    """A repository in the cache of the hub's client."""
    write(folder / "models--a--b" / "snapshots" / "0123" / "model_index.json")
    return folder / "models--a--b"


REFUSED: dict[str, tuple[Make, str]] = {
    "an empty folder": (empty, r"empty' is an empty folder$"),
    "a UNet's folder": (part, r"unet' is one part of a pipeline, its UNet2DConditionModel: .*, which is '"),
    "a text encoder": (text_encoder, r"is one part of a pipeline, its CLIPTextModel: name the folder of the"),
    "a LoRA's folder": (lora, r"lora' is a LoRA, not a pipeline: set model\.lora\.from=.*lora to go on"),
    "a run": (lambda f: run(f, trained="model"), r"is a run's folder; its model is '.*run/model'$"),
    "a run with a LoRA": (lambda f: run(f, trained="lora"), r"set model\.lora\.from=.*run to go on from it"),
    "an unfinished run": (run, r"not finished: `loopfast export .*run --to FOLDER` writes its model$"),
    "the hub's cache": (cached, r"has one in it: '.*models--a--b/snapshots/0123'$"),
    "a folder of files": (lambda f: tensors(f / "x" / "a.safetensors", "b").parent, r"such as '.*a\.saf"),
    "a folder of GGUF": (lambda f: write(f / "x" / "a.gguf").parent, r"folder of GGUF files; they hold"),
    "any folder": (lambda f: write(f / "x" / "a.txt").parent, r"no model_index\.json in it, but a\.txt$"),
    "an index": (lambda f: write(f / "model_index.json"), r"is a part of a pipeline: name its folder, '"),
    "a GGUF file": (lambda f: write(f / "a.gguf"), r"a\.gguf' is a GGUF file; they hold rounded weights"),
    "a pickled file": (lambda f: write(f / "a.ckpt"), r"is a pickled file, .*model\.allow_pickle: true"),
    "another file": (lambda f: write(f / "a.zip"), r"a\.zip' is a file of another kind; allowed: a pip"),
    "a LoRA's file": (lambda f: tensors(f / "a.safetensors", "lora_unet_x.alpha"), r"is a LoRA, not a model"),
    "a UNet's file": (
        lambda f: tensors(part(f) / "diffusion_pytorch_model.safetensors", "conv_in.weight"),
        r"is one part of a pipeline: name its folder, '",
    ),
    "other tensors": (lambda f: tensors(f / "a.safetensors", "head"), r"is no single file of a .* are head$"),
    "no tensors": (lambda f: write(f / "a.safetensors", "text"), r"a\.safetensors' cannot be read: "),
    "a pointer": (
        lambda f: write(f / "a.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        r"cannot be read: it is a pointer of Git LFS; `git lfs pull`",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_it_is_and_what_to_do(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message) as error:
        check_model(config(make(tmp_path)))
    assert str(error.value).startswith("model.pretrained: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["/nowhere/sd15", "./nowhere", "../nowhere", "~/nowhere", "nowhere/", "a.safetensors", "a/b.ckpt"]
)
def test_a_path_is_never_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.pretrained: no such folder or file: ") as error:
        find_source(config(name))
    assert name in str(error.value)


def test_a_folder_of_nearly_that_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "sd15").mkdir()
    with pytest.raises(ConfigError, match=rf"there is '{tmp_path / 'sd15'}'$"):
        find_source(config(tmp_path / "sd-15"))


def test_a_name_that_may_be_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # nothing is downloaded, as in a process without a network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_source(config("models/sd15")).pipeline == "models/sd15"
    with pytest.raises(ConfigError, match=r"at 'models/sd15': .*there is no such folder here, either$"):
        load_family(config("models/sd15"))
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match=r"; the folder 'models' is here, without 'sd15' in it$"):
        load_family(config("models/sd15"))
    write(tmp_path / "models" / "sd15" / "model_index.json", '{"_class_name": "FluxPipeline"}')
    assert find_source(config("models/sd15")).pipeline == Path("models/sd15")
    family = check_model(config("models/sd15"))
    assert family is not None
    assert family.title == "FLUX.1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/a/b/resolve/main/c.safetensors", r"is a link; a hub name is .* \('a/b'\)"),
        ("a/b/c", r"is neither a folder or file here nor a hub name"),
        ("my model", r"is neither a folder or file here nor a hub name"),
        ("x" * 5000, r"cannot be read|is neither a folder"),
        ("~nobody-of-that-name/x", r"cannot be read: "),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_source(config(name))


def test_a_configuration_of_its_own_is_for_a_single_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.config: found 'embedded', allowed: null where"):
        find_source(config("embedded", config="embedded"))
    file = tensors(tmp_path / "a.safetensors", "model.diffusion_model.out.2.bias")
    assert find_source(config(file)).file == file
    with pytest.raises(ConfigError, match=r"model\.config: '.*' is a folder of single files"):
        find_source(config(file, config=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"model\.config: no such folder or file: './nowhere'"):
        find_source(config(file, config="./nowhere"))
    with pytest.raises(ConfigError, match=r"model\.variant: found 'fp16', allowed: null with one file"):
        find_source(config(file, config="embedded", variant="fp16"))


def test_a_single_file_is_described_by_its_tensors(tmp_path: Path) -> None:
    """Diffusers knows SDXL by the second text encoder."""
    name = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    sdxl = tensors(tmp_path / "xl.safetensors", "model.diffusion_model.out.2.bias", name)
    assert find_source(config(sdxl)).pipeline == "stabilityai/stable-diffusion-xl-base-1.0"
    sd = tensors(tmp_path / "sd.safetensors", "model.diffusion_model.out.2.bias")
    assert find_source(config(sd)).pipeline == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_an_index_that_is_none(tmp_path: Path) -> None:
    write(tmp_path / "model_index.json", json.dumps(["a"]))
    with pytest.raises(ConfigError, match=r"is no diffusers pipeline: no _class_name in model_index\.json"):
        check_model(config(tmp_path))
