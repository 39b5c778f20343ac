from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from loopfast.policies.fast.guided_unet import guided_forward, shares_trunk

# Where the first attention to the text is: at once (Stable Diffusion), after a block (SDXL, embedded), and in between.
BLOCKS = {
    "at once": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "after a block": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "after two": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
}


def unet(down: tuple[str, ...] = BLOCKS["at once"], **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    up = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=down,
        up_block_types=tuple(up[name] for name in reversed(down)),
        block_out_channels=(8, 16, 16)[: len(down)],
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=6,
        **options,
    )


def inputs(size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 4, *size, generator=draw),
        torch.tensor([7, 400, 900]),
        torch.randn(3, 5, 6, generator=draw),
        torch.randn(3, 5, 6, generator=draw),
    )


def plain(
    model: UNet2DConditionModel, sample: torch.Tensor, timestep: torch.Tensor, text: Any, empty: Any
) -> Any:
    twice = torch.cat([sample, sample]), torch.cat([timestep, timestep])
    return model(*twice, torch.cat([text, empty]), return_dict=False)[0].chunk(2)


def gradients(model: UNet2DConditionModel, outputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.arange(outputs[0].numel()).view_as(outputs[0]).cos()
    ((outputs[0] * weights).sum() + (outputs[1] * weights.flip(0)).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", BLOCKS)
def test_outputs_and_gradients_are_those_of_one_doubled_call(where: str, checkpointing: bool) -> None:
    model = unet(BLOCKS[where])
    assert shares_trunk(model)
    expected = plain(model, *inputs())
    reference = gradients(model, expected)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    found = guided_forward(model, *inputs())
    for output, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    computed = gradients(model, found)
    assert computed.keys() == reference.keys()
    for name, gradient in computed.items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-4, rtol=1e-4, msg=name)


@torch.no_grad()
def test_latents_that_halve_to_odd_sizes() -> None:
    model = unet(BLOCKS["after two"])
    sizes = inputs((10, 6))
    for output, wanted in zip(guided_forward(model, *sizes), plain(model, *sizes), strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_comes_before_the_text_runs_once_for_both_halves() -> None:
    model = unet(BLOCKS["after a block"])
    rows: dict[str, int] = {}
    for name in (
        "conv_in",
        "down_blocks.0",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "conv_out",
    ):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: rows.__setitem__(
                name, len(output if isinstance(output, torch.Tensor) else output[0])
            )
        )
    guided_forward(model, *inputs())
    assert rows == {
        "conv_in": 3,
        "down_blocks.0": 3,
        "down_blocks.1.resnets.0": 3,
        "down_blocks.1.attentions.0": 6,
        "conv_out": 6,
    }


def test_other_models_are_left_to_their_own_forward() -> None:
    assert not shares_trunk(torch.nn.Linear(1, 1))
    assert not shares_trunk(unet(("DownBlock2D", "DownBlock2D"), mid_block_type=None))
    assert not shares_trunk(unet(class_embed_type="timestep"))
