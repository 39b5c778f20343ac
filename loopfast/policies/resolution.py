"""The size of a model's latents and images, and the number of images that an autoencoder decodes at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies.families import Family


def latent_size(
    config: ModelConfig, family: Family, denoiser: Mapping[str, Any], vae: Mapping[str, Any]
) -> tuple[int, int]:
    """Returns the height and width of a run's latents, from the configurations of two components.

    Raises:
        ConfigError: ``model.height`` or ``model.width`` is no whole number of tokens, or larger than the model's
            position embeddings allow.
    """
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    step = scale * family.patch
    size = family.size or denoiser["sample_size"]
    sides = []
    for key, own in zip(("height", "width"), (size, size) if isinstance(size, int) else size, strict=True):
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


# Four images of 512×512 by Stable Diffusion's autoencoder. Larger batches are not faster: one image fills a GPU.
_DECODER_BYTES = 4 * 2**30
# Number of tensors of the largest size in memory at once: a block's input, and its layers' outputs.
_DECODER_TENSORS = 4


def decoder_rows(vae: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Returns the number of latents of this size to decode at a time, for 4 GiB of float32 activations; at least 1."""
    channels = vae["block_out_channels"]
    pixels = size[0] * size[1] * 4 ** (len(channels) - 1)
    # the second is the width at full resolution
    image = 4 * _DECODER_TENSORS * max(channels[:2]) * pixels
    return int(max(1, _DECODER_BYTES // image))
