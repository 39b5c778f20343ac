"""Models for the race: Stable Diffusion 1.5's structure, scaled down, with random weights."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from benchmarks.embedded_model.parts import assemble, text_parts
from loopfast.policies.portable import save_portable

TOKENS = 77
TEXT_WIDTH = 128


def sd_small(layers: int = 2) -> StableDiffusionPipeline:
    """Makes SD 1.5's blocks and depths at a fifth of its width, with latents of 4×32×32 and images of 256×256.

    Args:
        layers: the number of layers in each block; SD 1.5 has 2.
    """
    torch.manual_seed(0)
    tokenizer, text_encoder = text_parts(TEXT_WIDTH, TOKENS)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=layers,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
    )
    return assemble(vae, tokenizer, text_encoder, unet)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race.models", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the pipeline; it appears when it is complete")
    folder = parser.parse_args().folder
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_portable(sd_small(), unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
