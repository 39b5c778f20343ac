"""The smallest pipeline that trains as Stable Diffusion does."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from loopfast.embedded.pretrain import Recipe, build, save


def write_pipeline(folder: Path, width: int = 16) -> Path:
    """A pipeline for 32x32 images with random weights and the embedded vocabulary; its UNet has one level.

    The time of a run is that of its modules, however small they are, and in a group of processes every module's weights
    are gathered by themselves. So there is one block with attention and no middle.

    Args:
        folder: where it is saved.
        width: channels of the UNet.

    Returns:
        The folder.
    """
    _, text_encoder, _, scheduler, tokenizer = build(Recipe())
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8,) * 3,
        mid_block_add_attention=False,
        norm_num_groups=8,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(width,),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipeline, folder)
    return folder
