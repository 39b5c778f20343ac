"""Faster layers for diffusers' UNets and autoencoders: the same functions, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from typing_extensions import override

from loopfast_kernels import group_norm_silu

# Matrix products of few rows are rounded differently from those of many; rows are padded to a multiple of this.
ROWS = 16

# Up to this number of queries × keys, two batched products beat scaled_dot_product_attention on a CPU.
SHORT_ATTENTION = 1024


def use_fast_layers(model: nn.Module) -> int:
    """Replaces the classes of a model's layers by faster equivalents, and returns the number of replaced layers.

    The layers' parameters and names stay. It is meant for CPUs; ``docs/speed.md`` has the figures.
    """
    replaced = 0
    for module in model.modules():
        for fast in _FAST:
            if type(module) is fast.__base__ and fast.replaces(module):
                module.__class__ = fast
                replaced += 1
    return replaced


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block whose normalizations, the time embedding's addition and SiLU are one op each."""

    @staticmethod
    def replaces(block: Any) -> bool:
        """Returns whether this is a block as in Stable Diffusion."""
        return (
            block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm == "default"
            and not block.skip_time_act
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.dropout.p == 0
        )

    @override
    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.conv1(_norm_silu(input_tensor, self.norm1))
        # an autoencoder's blocks have no time embedding
        shift = None if temb is None else _by_rows(self.time_emb_proj, F.silu(temb))
        hidden = _norm_silu(hidden, self.norm2, shift)
        hidden = self.conv2(hidden)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


def _norm_silu(hidden: Tensor, norm: nn.GroupNorm, shift: Tensor | None = None) -> Tensor:
    result: Tensor = group_norm_silu(
        hidden, norm.weight, norm.bias, norm.num_groups, eps=norm.eps, shift=shift
    )
    return result


def _by_rows(project: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Returns the projection of rows ``[M, C]``, with the same bits for every M."""
    count = len(inputs)
    return project(F.pad(inputs, (0, 0, 0, -count % ROWS)))[:count]


class PaddedTimestepEmbedding(TimestepEmbedding):
    """A time embedding that is rounded in the same way in large and small batches."""

    @staticmethod
    def replaces(embedding: Any) -> bool:
        """Returns True: it is the same computation."""
        return True

    @override
    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            return super().forward(sample, condition)
        return _by_rows(super().forward, sample)


class TransposedUpsample2D(Upsample2D):
    """Nearest-neighbor upsampling and its 3x3 convolution as one transposed convolution.

    Each output sees 2x2 of the inputs, so the nine taps on the enlarged image collapse to four: 4/9 of the work, and
    no enlarged image. The 4x4 kernel is the sum of the 3x3 one's four shifts.
    """

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Returns whether this is a convolution of an enlarged image without an adapter, which may be added later."""
        return (
            layer.norm is None
            and layer.use_conv
            and not layer.use_conv_transpose
            and layer.interpolate
            and layer.name == "conv"
            and type(layer.conv) is nn.Conv2d
            and layer.conv.kernel_size == (3, 3)
            and layer.conv.padding == (1, 1)
        )

    @override
    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        doubled = tuple(2 * size for size in hidden_states.shape[-2:])
        other_size = output_size is not None and tuple(output_size) != doubled
        if other_size or not self.replaces(self):
            return super().forward(hidden_states, output_size)
        weight = self.conv.weight
        device = weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # rounded before the sum, as weights stored in this type would be
            weight = weight.to(torch.get_autocast_dtype(device))
        weight = weight.flip(2, 3).transpose(0, 1)
        shifts = [F.pad(weight, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
        kernel = torch.stack(shifts).sum(0)
        return F.conv_transpose2d(hidden_states, kernel, self.conv.bias, stride=2, padding=1)


class SplitGEGLU(GEGLU):
    """A gated activation with a product for each half, so that autograd does not split and join tensors."""

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Returns whether the projection has no adapter, which may be added later."""
        return type(layer.proj) is nn.Linear

    @override
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.replaces(self):
            return super().forward(hidden_states, *args, **kwargs)
        weight = self.proj.weight.chunk(2)
        bias = (None, None) if self.proj.bias is None else self.proj.bias.chunk(2)
        hidden, gate = (F.linear(hidden_states, *half) for half in zip(weight, bias, strict=True))
        return hidden * F.gelu(gate)


class ViewingTransformer2DModel(Transformer2DModel):
    """Transformer blocks on channels-last images, whose tokens are a view of the image and back."""

    @staticmethod
    def replaces(model: Any) -> bool:
        """Returns whether this is a model as in Stable Diffusion."""
        return bool(model.is_input_continuous)

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if not residual.is_contiguous(memory_format=torch.channels_last):
            result: Tensor = super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
            return result
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


class ShortAttnProcessor(AttnProcessor2_0):
    """Attention by two batched matrix products if there are few tokens; otherwise that of the base class."""

    @override
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        plain = hidden_states.ndim == 3 and attention_mask is None and _is_plain(attn)
        if not plain or hidden_states.shape[1] * states.shape[1] > SHORT_ATTENTION:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        query = _split_heads(attn.to_q(hidden_states) * attn.scale, attn.heads)
        key, value = (_split_heads(project(states), attn.heads) for project in (attn.to_k, attn.to_v))
        weights = torch.bmm(query, key.transpose(1, 2)).softmax(-1, dtype=torch.float32).to(value.dtype)
        hidden = torch.bmm(weights, value).unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        hidden = attn.to_out[1](attn.to_out[0](hidden))
        hidden = hidden + hidden_states if attn.residual_connection else hidden
        return hidden if attn.rescale_output_factor == 1.0 else hidden / attn.rescale_output_factor


def _is_plain(attn: Any) -> bool:
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return not any(extras)


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """Reshapes ``[B, S, heads · D]`` to ``[B · heads, S, D]``."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


_FAST: tuple[Any, ...] = (
    FusedResnetBlock2D,
    TransposedUpsample2D,
    PaddedTimestepEmbedding,
    SplitGEGLU,
    ViewingTransformer2DModel,
)
