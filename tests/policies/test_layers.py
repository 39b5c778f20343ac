from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from loopfast.policies.fast.layers import (
    SHORT_ATTENTION,
    FusedResnetBlock2D,
    ShortAttnProcessor,
    TransposedUpsample2D,
    ViewingTransformer2DModel,
    use_fast_layers,
)

FORMATS = [torch.contiguous_format, torch.channels_last]


def image(*shape: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return drawn.contiguous(memory_format=memory_format).requires_grad_()


def gradients(module: nn.Module, output: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.arange(output.numel()).view(output.shape).cos()
    return list(torch.autograd.grad((output * weights).sum(), [*inputs, *module.parameters()]))


def assert_same(fast: nn.Module, base: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Outputs and all gradients, up to rounding."""
    found, wanted = fast(*inputs, **options), base(*inputs, **options)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(
        gradients(fast, found, *inputs), gradients(base, wanted, *inputs), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_upsampling_is_a_transposed_convolution(
    size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    base = Upsample2D(6, use_conv=True, out_channels=4).to(memory_format=memory_format)
    fast = copy.deepcopy(base)
    assert use_fast_layers(fast) == 1
    assert type(fast) is TransposedUpsample2D
    assert fast.state_dict().keys() == base.state_dict().keys()
    x = image(2, 6, *size, memory_format=memory_format)
    assert_same(fast, base, x)
    doubled = tuple(2 * length for length in size)
    assert_same(fast, base, x, output_size=doubled)
    # sizes that are not the double, as after halving an odd one
    assert_same(fast, base, x, output_size=(doubled[0] + 1, doubled[1]))


def test_upsampling_with_an_adapter_is_left_alone() -> None:
    layer = nn.Sequential(Upsample2D(4, use_conv=True))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv"]), layer)
    assert use_fast_layers(layer) == 0


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "scale"), [((8, 8), 1.0), ((8, 12), 2.0)])
def test_a_residual_block(
    channels: tuple[int, int], scale: float, memory_format: torch.memory_format
) -> None:
    base = ResnetBlock2D(
        in_channels=channels[0],
        out_channels=channels[1],
        temb_channels=10,
        groups=4,
        output_scale_factor=scale,
    ).to(memory_format=memory_format)
    for norm in (base.norm1, base.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    fast = copy.deepcopy(base)
    assert use_fast_layers(fast) == 1
    assert type(fast) is FusedResnetBlock2D
    assert_same(fast, base, image(3, channels[0], 4, 4, memory_format=memory_format), image(3, 10))


def test_a_residual_block_without_time() -> None:
    base = ResnetBlock2D(in_channels=8, temb_channels=None, groups=4)
    fast = copy.deepcopy(base)
    assert use_fast_layers(fast) == 1
    x = image(3, 8, 4, 4)
    torch.testing.assert_close(fast(x, None), base(x, None), atol=1e-5, rtol=1e-5)


def test_residual_blocks_of_other_kinds_are_left_alone() -> None:
    common = {"in_channels": 8, "temb_channels": 10, "groups": 4}
    for options in (
        {"up": True},
        {"time_embedding_norm": "scale_shift"},
        {"non_linearity": "gelu"},
        {"dropout": 0.1},
    ):
        assert use_fast_layers(ResnetBlock2D(**common, **options)) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_the_gated_activation(bias: bool) -> None:
    base = GEGLU(6, 10, bias=bias)
    fast = copy.deepcopy(base)
    assert use_fast_layers(fast) == 1
    assert_same(fast, base, image(2, 5, 6))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("linear", [True, False])
def test_a_transformer(linear: bool, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    base = Transformer2DModel(
        2, 4, 8, norm_num_groups=4, cross_attention_dim=6, use_linear_projection=linear
    ).to(memory_format=memory_format)
    fast = copy.deepcopy(base)
    assert use_fast_layers(fast) == 2  # with its activation
    assert type(fast) is ViewingTransformer2DModel
    x, text = image(3, 8, 4, 6, memory_format=memory_format), image(3, 5, 6)
    found, wanted = (model(x, encoder_hidden_states=text, return_dict=False)[0] for model in (fast, base))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(
        gradients(fast, found, x, text), gradients(base, wanted, x, text), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("queries", [4, SHORT_ATTENTION // 2 + 1])
@pytest.mark.parametrize("cross", [False, True])
def test_attention(queries: int, cross: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(12, cross_attention_dim=6 if cross else None, heads=3, dim_head=4)
    twin = copy.deepcopy(attention)
    attention.set_processor(ShortAttnProcessor())
    twin.set_processor(AttnProcessor2_0())
    hidden = image(2, queries, 12)
    assert_same(attention, twin, hidden, **({"encoder_hidden_states": image(2, 2, 6)} if cross else {}))


def test_attention_of_other_kinds_goes_to_its_base() -> None:
    torch.manual_seed(0)
    attention = Attention(
        12, heads=3, dim_head=4, norm_num_groups=2, residual_connection=True, rescale_output_factor=2.0
    )
    twin = copy.deepcopy(attention)
    attention.set_processor(ShortAttnProcessor())
    twin.set_processor(AttnProcessor2_0())
    hidden, mask = image(2, 5, 12), torch.zeros(2, 5)
    torch.testing.assert_close(attention(hidden), twin(hidden))
    torch.testing.assert_close(attention(hidden, attention_mask=mask), twin(hidden, attention_mask=mask))
    images = image(2, 12, 2, 2)
    torch.testing.assert_close(attention(images), twin(images))
