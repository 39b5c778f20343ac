"""Tiny pipelines of every supported family, with random weights and the embedded world's vocabulary.

A random adapter of a denoiser must change its outputs by more than 1e-3: gates are open, and nothing begins at zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from benchmarks.embedded_model.tokenizer import MAX_LENGTH, words, write_tokenizer
from loopfast.policies.portable import save_portable

PROCESS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def _autoencoder(channels: int, **options: Any) -> AutoencoderKL:
    """Makes an autoencoder for images of 32x32, with latents of ``channels`` x8x8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=0,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


def _clip(tokenizer: CLIPTokenizer, width: int, kind: type = CLIPTextModel, layers: int = 2) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(width: int) -> tuple[T5TokenizerFast, T5EncoderModel]:
    pieces = [*"abcdefghijklmnopqrstuvwxyz", *(f"▁{word}" for word in words()), "▁"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [(piece, -float(index + 1)) for index, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=MAX_LENGTH)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        )
    )
    return tokenizer, encoder


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    )


_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def stable_diffusion(
    prediction_type: str = "epsilon", unet: UNet2DConditionModel | None = None, **scheduler: Any
) -> StableDiffusionPipeline:
    """Makes Stable Diffusion 1.x, or 2.x with ``v_prediction``."""
    tokenizer = _clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_autoencoder(4),
        text_encoder=_clip(tokenizer, 16),
        tokenizer=tokenizer,
        unet=unet or _unet(cross_attention_dim=16, attention_head_dim=2, **_BLOCKS),
        scheduler=DDIMScheduler(**PROCESS, prediction_type=prediction_type, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def smallest_stable_diffusion(width: int = 16) -> StableDiffusionPipeline:
    """Makes the smallest model that still trains like Stable Diffusion, with this number of channels.

    The time of a run depends on the number of modules, however small they are, and with several processes every
    module's weights are gathered separately. So the model has one block with attention and no middle block.
    """
    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(width,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=_autoencoder(4, mid_block_add_attention=False),
        text_encoder=_clip(tokenizer, 16, layers=1),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**PROCESS, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def shallow_stable_diffusion(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """Makes a model with one resolution and no middle block: every kind of layer to compile, and few of each."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    shape = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        **blocks, **shape, mid_block_type=None, cross_attention_dim=16, attention_head_dim=2
    )
    return stable_diffusion(prediction_type, unet)


def stable_diffusion_xl(*, force_zeros_for_empty_prompt: bool = True) -> StableDiffusionXLPipeline:
    """Makes SDXL: two text encoders, a pooled embedding and six time ids."""
    tokenizer = _clip_tokenizer()
    unet = _unet(
        cross_attention_dim=32,
        attention_head_dim=(2, 2),
        mid_block_type=None,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        **_BLOCKS,
    )
    scheduler = {key: value for key, value in PROCESS.items() if key != "clip_sample"}
    return StableDiffusionXLPipeline(
        vae=_autoencoder(4, force_upcast=True),
        text_encoder=_clip(tokenizer, 16),
        text_encoder_2=_clip(tokenizer, 16, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**scheduler, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    )


def stable_diffusion_3(*, t5: bool = True, **transformer: Any) -> StableDiffusion3Pipeline:
    """Makes SD 3: three text encoders, T5 is optional; SD 3.5 with ``dual_attention_layers`` and ``qk_norm``."""
    tokenizer = _clip_tokenizer()
    tokenizer_3, text_encoder_3 = _t5(32) if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            **transformer,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(
            16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=_clip(tokenizer, 16, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, 16, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def stable_diffusion_35() -> StableDiffusion3Pipeline:
    """Makes SD 3.5 medium: a second attention in some blocks, normalized queries and keys."""
    return stable_diffusion_3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux(*, guidance_embeds: bool = True) -> FluxPipeline:
    """Makes FLUX.1 [dev]: packed latents, distilled guidance, a shift by the resolution. [schnell] has no guidance."""
    tokenizer = _clip_tokenizer()
    tokenizer_2, text_encoder_2 = _t5(16)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance_embeds,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0,
            use_dynamic_shifting=guidance_embeds,
            base_image_seq_len=256,
            max_image_seq_len=4096,
            base_shift=0.5,
            max_shift=1.15,
        ),
        vae=_autoencoder(
            4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=_clip(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def pixart(*, alpha: bool = False) -> PixArtSigmaPipeline | PixArtAlphaPipeline:
    """Makes PixArt-Σ: a transformer with cross-attention to T5, which also predicts a variance that nothing uses.

    With ``alpha`` it is PixArt-α of 1024 pixels, whose inputs include size and aspect ratio.
    """
    tokenizer, text_encoder = _t5(16)
    scheduler = {key: value for key, value in PROCESS.items() if key != "clip_sample"}
    kind = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    return kind(
        transformer=PixArtTransformer2DModel(
            sample_size=128 if alpha else 8,
            num_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            caption_channels=16,
            use_additional_conditions=alpha,
            patch_size=2,
        ),
        scheduler=DPMSolverMultistepScheduler(**scheduler),
        vae=_autoencoder(4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd-v": lambda: shallow_stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd35": stable_diffusion_35,
    "flux": flux,
    "pixart": pixart,
}
"""Name of each family, and what builds its tiny pipeline."""


def settings_of(family: str) -> dict[str, int]:
    """Returns the keys of ``model`` that keep a family's tiny pipeline tiny."""
    settings = {} if family.startswith(("sd-", "sdxl")) or family == "sd" else {"max_sequence_length": 12}
    # the only denoiser whose configuration does not contain the size of its images
    return {**settings, "height": 32, "width": 32} if family == "flux" else settings


def save_tiny(family: str | Callable[[], Any], folder: Path) -> Path:
    """Writes the tiny pipeline of a family into a folder, which is returned."""
    torch.manual_seed(0)
    pipeline = (FAMILIES[family] if isinstance(family, str) else family)()
    save_portable(pipeline, folder)
    return folder
