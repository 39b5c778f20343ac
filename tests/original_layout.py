"""A tiny Stable Diffusion under the names of CompVis' files, which `diffusers`' ``from_single_file`` reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


def save_single_file(pipeline: Any, file: Path, *, parts: tuple[str, ...] = ("vae", "text_encoder")) -> Path:
    """Writes the UNet of a ``StableDiffusionPipeline``, and the given parts, into one file, which is returned."""
    found = {f"model.diffusion_model.{name}": value for name, value in _unet(pipeline.unet)}
    if "vae" in parts:
        found |= {f"first_stage_model.{name}": value for name, value in _vae(pipeline.vae)}
    if "text_encoder" in parts:
        found |= {
            f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
            for name, value in pipeline.text_encoder.state_dict().items()
        }
    found = {name: value.contiguous() for name, value in found.items()}
    if file.suffix == ".safetensors":
        save_file(found, file)
    else:
        torch.save({"state_dict": found}, file)
    return file


def _unet(unet: Any) -> Iterator[tuple[str, Tensor]]:
    places = dict(_UNET)
    for kind, blocks in (("input", unet.down_blocks), ("output", unet.up_blocks)):
        side = "down" if kind == "input" else "up"
        number = 1 if kind == "input" else 0
        for level, block in enumerate(blocks):
            attentions = getattr(block, "attentions", [])
            for layer in range(len(block.resnets)):
                places[f"{side}_blocks.{level}.resnets.{layer}"] = f"{kind}_blocks.{number}.0"
                if attentions:
                    places[f"{side}_blocks.{level}.attentions.{layer}"] = f"{kind}_blocks.{number}.1"
                number += 1
            if kind == "input" and block.downsamplers:
                places[f"{side}_blocks.{level}.downsamplers.0.conv"] = f"{kind}_blocks.{number}.0.op"
                number += 1
            if kind == "output" and block.upsamplers:
                at = 2 if attentions else 1
                places[f"{side}_blocks.{level}.upsamplers.0"] = f"{kind}_blocks.{number - 1}.{at}"
    for name, value in unet.state_dict().items():
        place = max((key for key in places if name.startswith(f"{key}.")), key=len)
        rest = name.removeprefix(f"{place}.")
        if "resnets" in place:
            part, _, last = rest.rpartition(".")
            rest = f"{_RESNET[part]}.{last}"
        yield f"{places[place]}.{rest}", value


def _vae(vae: Any) -> Iterator[tuple[str, Tensor]]:
    levels = len(vae.config.block_out_channels)
    for name, value in vae.state_dict().items():
        for ours, theirs in _VAE.items():
            name = re.sub(rf"\b{re.escape(ours)}\b", theirs, name)
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found.group(1))}", name)
        name = name.replace("down_blocks", "down").replace("resnets", "block")
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        square = "attn_1" in name and value.ndim == 2
        yield name, value[:, :, None, None] if square else value
