"""A UNet's forward under guidance: everything before the first attention is computed once for both halves."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor


def shares_trunk(unet: torch.nn.Module) -> TypeGuard[UNet2DConditionModel]:
    """Returns whether :func:`guided_forward` supports this model: a ``UNet2DConditionModel`` as in Stable Diffusion.

    Models with other conditioning than text (classes, images, added embeddings) or other blocks use their own forward.
    """
    if not isinstance(unet, UNet2DConditionModel) or unet.mid_block is None:
        return False
    config: Any = unet.config
    plain = (
        "addition_embed_type",
        "class_embed_type",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
        "time_embedding_act_fn",
    )
    return (
        not config.center_input_sample
        and all(config[name] is None for name in plain)
        and set(config.down_block_types) <= {"DownBlock2D", "CrossAttnDownBlock2D"}
        and "CrossAttnDownBlock2D" in config.down_block_types
        and set(config.up_block_types) <= {"UpBlock2D", "CrossAttnUpBlock2D"}
        and config.mid_block_type == "UNetMidBlock2DCrossAttn"
    )


def guided_forward(
    unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor, text: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the outputs of a UNet for both halves of classifier-free guidance.

    They equal, up to rounding, one call on 2M rows (``cat([sample, sample])``, ``cat([text, empty])``). The rows of the
    two halves are the same up to the first attention to the text, so everything before it, and its share of the
    backward pass, is computed for M rows: in Stable Diffusion the first convolution and residual block, in UNets whose
    first blocks have no attention (the embedded one's) those blocks too.

    The UNet is one that :func:`shares_trunk` accepts. ``sample`` is ``[M, C, H, W]``, ``timestep`` ``[M]`` on its
    device, and ``text`` and ``empty`` are the encoded prompts and the encoded empty prompt, ``[M, S, D]``.

    Returns:
        ``(conditional, unconditional)``, ``[M, C, H, W]`` each.
    """
    temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    hidden = unet.conv_in(sample)
    skipped = [hidden]
    states = torch.cat([text, empty])
    shared = True
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", None)
        if attentions is None or not shared:
            options = {} if attentions is None else {"encoder_hidden_states": states}
            hidden, outputs = block(hidden_states=hidden, temb=temb, **options)
            skipped.extend(outputs)
            continue
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            hidden = _checkpointed(block, resnet, hidden, temb)
            if shared:
                hidden, temb = torch.cat([hidden, hidden]), torch.cat([temb, temb])
                skipped = [torch.cat([skip, skip]) for skip in skipped]
                shared = False
            hidden = attention(hidden, encoder_hidden_states=states, return_dict=False)[0]
            skipped.append(hidden)
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)
            skipped.append(hidden)
    hidden = unet.mid_block(hidden, temb, encoder_hidden_states=states)
    for index, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        taken, skipped = tuple(skipped[-count:]), skipped[:-count]
        options = {"encoder_hidden_states": states} if hasattr(block, "attentions") else {}
        # latents that are halved to odd sizes must get their former size back
        size = None if index == len(unet.up_blocks) - 1 else skipped[-1].shape[2:]
        if size is not None and all(
            now * 2 == then for now, then in zip(hidden.shape[2:], size, strict=True)
        ):
            size = None
        hidden = block(
            hidden_states=hidden, temb=temb, res_hidden_states_tuple=taken, upsample_size=size, **options
        )
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    conditional, unconditional = unet.conv_out(hidden).chunk(2)
    return conditional, unconditional


def _checkpointed(block: Any, module: torch.nn.Module, *inputs: Tensor) -> Tensor:
    """Returns the module's output, recomputed in the backward pass if the block's checkpointing is on."""
    if torch.is_grad_enabled() and block.gradient_checkpointing:
        result: Tensor = block._gradient_checkpointing_func(module, *inputs)
        return result
    output: Tensor = module(*inputs)
    return output
