"""The size of a model's latents: its own, or that of the images a configuration asks for."""

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
