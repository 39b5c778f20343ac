"""The size of a model's latents and images, and how many images an autoencoder decodes at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies.families import Family


def latent_size(
    config: ModelConfig, family: Family, denoiser: Mapping[str, Any], vae: Mapping[str, Any]
) -> tuple[int, int]:
    """Height and width of the latents of a run.

    Args:
        config: the section ``model``.
        family: of its pipeline.
        denoiser, vae: configurations of these two components.

    Raises:
        ConfigError: ``model.height`` or ``model.width`` is no whole number of tokens, or more than the model has
            positions for.
    """
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    step = scale * family.patch
    sides = []
    for key, own in zip(("height", "width"), family.latent_size(denoiser), strict=True):
        pixels = getattr(config, key) or own * scale
        if pixels % step:
            raise ConfigError(f"model.{key}: found {pixels}, allowed: a multiple of {step} with this model")
        most = denoiser.get("pos_embed_max_size")
        if most is not None and pixels > most * step:
            raise ConfigError(
                f"model.{key}: found {pixels}, allowed: at most {most * step}, for which this model has positions"
            )
        sides.append(pixels // scale)
    return sides[0], sides[1]


# Four images of 512×512 by Stable Diffusion's autoencoder. More at a time are not faster, as one fills a GPU.
_DECODER_BYTES = 4 * 2**30
# Tensors of the largest size that are in memory at once: a block's input, and what its layers make of it.
_DECODER_TENSORS = 4


def decoder_rows(vae: Mapping[str, Any], size: tuple[int, int]) -> int:
    """How many images an autoencoder decodes at a time, for about 4 GiB of float32 activations; at least 1.

    Args:
        vae: its configuration. The second of its ``block_out_channels`` is the width at the size of the image.
        size: height and width of the latents.
    """
    channels = vae["block_out_channels"]
    pixels = size[0] * size[1] * 4 ** (len(channels) - 1)
    image = 4 * _DECODER_TENSORS * max(channels[:2]) * pixels
    return int(max(1, _DECODER_BYTES // image))
