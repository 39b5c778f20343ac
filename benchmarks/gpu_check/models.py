"""Pipelines of the sizes that people train, with random weights, so that nothing must be downloaded.

Denoisers and autoencoders are those that `loopfast plan` knows. Text encoders have the right widths and two layers;
they run once an iteration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.race.models import sd_small
from loopfast.config import ModelConfig
from loopfast.planning import load_architecture
from loopfast.policies.portable import save_portable


def sd15(device: str) -> Any:
    """Makes Stable Diffusion 1.5: images of 512x512, 860 M weights in its denoiser, in bfloat16."""
    pipeline = sd_small()
    denoiser, vae = _networks("sd15", device)
    encoder = _text_encoder(pipeline.text_encoder, 768, CLIPTextModel)
    pipeline.register_modules(unet=denoiser, vae=vae, text_encoder=encoder)
    return pipeline


def sd35_medium(device: str) -> Any:
    """Makes Stable Diffusion 3.5 medium without T5, whose rows diffusers fills with zeros: 2,243 M weights, in
    bfloat16.
    """
    small = sd_small()
    denoiser, vae = _networks("sd35-medium", device)
    encoders = [
        _text_encoder(small.text_encoder, width, CLIPTextModelWithProjection) for width in (768, 1280)
    ]
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=small.tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=small.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def tiny(family: str) -> Any:
    """Makes the tiny pipeline of a family from the tests; its images have 32x32 pixels."""
    from tests.families import stable_diffusion, stable_diffusion_3

    if family == "sd15":
        return stable_diffusion()
    return stable_diffusion_3(t5=False, dual_attention_layers=(0,), qk_norm="rms_norm")


def write(pipeline: Any, folder: Path) -> dict[str, int]:
    """Saves a pipeline; returns the number of its denoiser's weights and the files' bytes."""
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    save_portable(pipeline, folder)
    files = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return {"parameters": sum(p.numel() for p in denoiser.parameters()), "bytes": sum(files)}


def _networks(name: str, device: str) -> tuple[Any, Any]:
    """Makes the denoiser in bfloat16 and the autoencoder on the device; a CPU would need long for this many numbers."""
    import diffusers

    architecture = load_architecture(ModelConfig(pretrained=name), name)
    torch.manual_seed(0)
    with torch.device(device):
        denoiser = getattr(diffusers, architecture.denoiser.class_name).from_config(
            architecture.denoiser.config
        )
        vae = AutoencoderKL.from_config(architecture.vae.config)
    return denoiser.to(torch.bfloat16).eval(), vae.eval()


def _text_encoder(like: Any, width: int, kind: Any) -> Any:
    """Makes a text encoder of two layers with the vocabulary of another one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return kind(CLIPTextConfig(**{**like.config.to_dict(), **sizes, "num_attention_heads": width // 64}))
