"""Single files with the weights of a whole model, in the layout of its authors; diffusers converts them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError, first_line

# Prefixes of a pipeline's components in the files of Stable Diffusion, SDXL, SD 3 and FLUX.
_PLACES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g.", "text_encoders.t5xxl."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
_DENOISER = ("model.diffusion_model.", "double_blocks.", "joint_blocks.")
_LORA = ("lora", "lokr", "hada", "dora_scale")


def described_by(tensors: Mapping[str, Tensor]) -> str:
    """Returns the hub name of the pipeline that a file belongs to, which diffusers recognizes by its tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])


def load_single_file(
    pipeline_class: Any, file: Path, pipeline: Path | str, revision: str | None, options: dict[str, Any]
) -> Any:
    """Loads the pipeline with a file's weights, in their own types.

    Components that the file lacks (files of FLUX.1 do) come from the pipeline that describes it, a folder or hub name
    of this revision. ``options`` are more arguments of ``from_single_file``; a component that is None is not loaded.

    Raises:
        ConfigError: the file does not hold a whole model, or diffusers reads no single files of this family.
        OSError, ValueError: diffusers' own errors.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    names = shapes(file)
    if not hasattr(pipeline_class, "from_single_file"):
        raise ConfigError(f"model.pretrained: {str(file)!r}: diffusers reads no single files of this family")
    index = pipeline_class.load_config(pipeline, revision=revision)
    lacking = [
        part
        for part, places in _PLACES.items()
        if (index.get(part) or [None])[0] is not None
        and options.get(part, ...) is not None
        and not any(name.startswith(places) for name in names)
    ]
    if lacking:
        others = {
            part: None for part, entry in index.items() if isinstance(entry, list) and part not in lacking
        }
        donor = pipeline_class.from_pretrained(
            pipeline, revision=revision, use_safetensors=True, **{**options, **others}
        )
        options = {**options, **{part: getattr(donor, part) for part in lacking}}
    try:
        loaded = pipeline_class.from_single_file(
            str(file), config=str(pipeline), revision=revision, **options
        )
    except SingleFileComponentError as error:
        raise ConfigError(f"model.pretrained: {str(file)!r}: {first_line(error)}") from error
    except NotImplementedError as error:  # weights that the file lacks are on the device "meta"
        raise ConfigError(
            f"model.pretrained: {str(file)!r} lacks tensors of the pipeline that {str(pipeline)!r} describes"
        ) from error
    for part, network in loaded.components.items():
        if isinstance(network, torch.nn.Module):
            empty = [name for name, value in network.named_parameters() if value.is_meta]
            if empty:
                raise ConfigError(
                    f"model.pretrained: {str(file)!r} lacks {len(empty)} tensor(s) of the {part} that "
                    f"{str(pipeline)!r} describes, such as {empty[0]}"
                )
    return loaded


def shapes(file: Path) -> Mapping[str, Tensor]:
    """Returns the tensors of a whole model's file by name, without their values.

    Raises:
        ConfigError: the file cannot be read, or does not hold a whole model.
    """
    found = read_shapes("model.pretrained", file)
    name = f"model.pretrained: {str(file)!r}"
    if any(word in key for key in found for word in _LORA):
        raise ConfigError(
            f"{name} is a LoRA, not a model: set model.lora.from={file} to go on from it, and model.pretrained to the "
            "model that it was trained on; `loopfast sample` takes it with --pretrained"
        )
    if not any(key.startswith(_DENOISER) for key in found):
        whole = file.resolve().parent.parent
        if (whole / "model_index.json").is_file():
            raise ConfigError(f"{name} is one part of a pipeline: name its folder, {str(whole)!r}")
        shown = ", ".join(list(found)[:3])
        raise ConfigError(
            f"{name} is no single file of a whole model: no tensor's name begins with {_DENOISER[0]!r}; there are "
            f"{shown or 'none'}"
        )
    return found


def read_shapes(key: str, file: Path) -> Mapping[str, Tensor]:
    """Returns the tensors of any file of weights, without their values; ``key`` is for messages."""
    try:
        return _read(file, file.stat().st_mtime_ns)
    except Exception as error:  # torch and safetensors raise many kinds of errors
        reason = first_line(error)
        if _is_lfs_pointer(file):
            reason = "it is a pointer of Git LFS; `git lfs pull` in its repository downloads the file"
        raise ConfigError(f"{key}: {str(file)!r} cannot be read: {reason}") from error


def _is_lfs_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


@lru_cache(maxsize=4)
def _read(file: Path, changed: int) -> Mapping[str, Tensor]:
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {
                name: torch.empty(opened.get_slice(name).get_shape(), device="meta")
                for name in opened.keys()  # noqa: SIM118 - it is no mapping
            }
    found = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    while "state_dict" in found:
        found = found["state_dict"]
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
