"""Traces the networks of a run: the denoiser's calls in rollout and replay, and the autoencoder's decoder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopfast.config import Config, LoraConfig, ModelConfig
from loopfast.planning.architectures import Architecture
from loopfast.planning.counting import Precision, Recorder, Trace, rows_to_trace
from loopfast.policies.adapter import add_adapter
from loopfast.policies.fast.guided_unet import guided_forward, shares_trunk
from loopfast.policies.fast.layers import ShortAttnProcessor
from loopfast.policies.fast.switches import set_layers

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Form:
    """The types and the options with which a denoiser is held and called.

    Attributes:
        device: the kind of the device, which decides on layers, attention and autocast.
        adapter: the adapter that is trained. None trains all weights.
        weights: the type of the weights, without an adapter's.
        adapter_weights: the type of the adapter's weights.
        compute: the type of latents and activations.
        guided: whether both halves of classifier-free guidance are computed.
        checkpointing: whether activations are recomputed.
        fast_layers, channels_last, attention, shared_trunk: the keys of the section ``model``.
    """

    device: DeviceKind
    adapter: LoraConfig | None
    weights: str
    adapter_weights: str
    compute: str
    guided: bool
    checkpointing: bool
    fast_layers: str
    channels_last: str
    attention: str
    shared_trunk: bool

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of autocast; None if the weights have the type to compute in."""
        return getattr(torch, self.compute) if self.weights != self.compute else None


def form_of(config: Config, device: DeviceKind, *, sharded: bool) -> Form:
    """Returns the form in which a configuration trains its denoiser.

    With ``sharded`` DeepSpeed holds the float32 weights (ZeRO stages 1 to 3).
    """
    model = config.model
    lora = model.tune == "lora"
    return Form(
        device=device,
        adapter=model.lora if lora else None,
        weights=model.dtype if lora or sharded else "float32",
        adapter_weights=model.dtype if sharded else "float32",
        compute=model.dtype,
        guided=config.rollout.guidance_scale != 1,
        checkpointing=config.train.gradient_checkpointing,
        fast_layers=model.fast_layers,
        channels_last=model.channels_last,
        attention=model.attention,
        shared_trunk=model.shared_trunk,
    )


@dataclass(frozen=True)
class Weights:
    """The sizes of a denoiser's weights.

    Attributes:
        parameters: the number of parameters, without an adapter's.
        trained: the number of trained parameters.
        buffers: bytes of the buffers.
        images: the number of parameters in trained convolution kernels, whose layout in memory and in files may differ.
        largest: the number of parameters in the largest weight.
    """

    parameters: int
    trained: int
    buffers: int
    images: int
    largest: int


@cache
def weights_of(architecture: Architecture, form: Form) -> Weights:
    """Returns the sizes of a denoiser's weights; buffers count as float32 if all weights are trained."""
    module = _denoiser(architecture, form if form.adapter else replace(form, weights="float32"))
    sizes = [p.numel() for p in module.parameters()]
    trained = [p for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    return Weights(
        parameters=sum(sizes) - (count if form.adapter else 0),
        trained=count,
        buffers=sum(b.numel() * b.element_size() for b in module.buffers()),
        images=sum(p.numel() for p in trained if p.dim() == 4),
        largest=max(sizes),
    )


def training_call(architecture: Architecture, form: Form, *, accumulating: bool) -> Trace:
    """Returns the trace of a forward and backward pass.

    With ``accumulating`` gradients exist before the call, so that they are not counted. Without it the call makes them.
    """
    return _trace(architecture, form, backward=True, accumulating=accumulating)


def sampling_call(architecture: Architecture, form: Form) -> Trace:
    """Returns the trace of a forward pass without gradients. An adapter counts as float32, which is nearly the same."""
    form = replace(form, checkpointing=False, adapter_weights="float32")
    return _trace(architecture, form, backward=False, accumulating=False)


def decoding_call(architecture: Architecture, config: ModelConfig, device: DeviceKind) -> Trace:
    """Returns the trace of the autoencoder's decoder."""
    layers = config.fast_layers, config.channels_last, device
    return _decoding(architecture, decoder_type(config), config.vae_tiling, *layers)


@cache
def _decoding(architecture: Architecture, dtype_name: str, tiling: bool, *layers: str) -> Trace:
    dtype = getattr(torch, dtype_name)
    vae: Any = torch.nn.Module.to(architecture.vae.build(), dtype)
    set_layers((vae,), *layers)
    if tiling:
        vae.enable_tiling()
    rows = rows_to_trace(vae, *architecture.decoded_shape, *architecture.image_shape)
    recorder = Recorder(rows, (*vae.parameters(), *vae.buffers()))
    latents = torch.empty(rows, *architecture.decoded_shape, device="meta")
    with torch.no_grad(), Precision(), recorder:
        latents = (latents / vae.config.scaling_factor).to(dtype)
        images = vae.decode(latents, return_dict=False)[0].float()
        images = (images / 2 + 0.5).clamp(0, 1).contiguous()
    return recorder.trace()


def decoder_type(config: ModelConfig) -> str:
    """Returns the type of the decoder's weights and activations."""
    return config.dtype if config.decoder_precision == "model" else "float32"


@cache
def _trace(architecture: Architecture, form: Form, *, backward: bool, accumulating: bool) -> Trace:
    module = _denoiser(architecture, form)
    on_gpu = form.device == "cuda"
    if form.checkpointing:
        # activations are recomputed inside the backward pass, where the mode around it is not active
        recomputing = partial(Precision, form.autocast, on_gpu=on_gpu)
        module.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing()))
        )
    compute = getattr(torch, form.compute)
    tokens = architecture.text_tokens
    # a transformer joins the tokens of image and text
    rows = rows_to_trace(module, *architecture.latent_shape, tokens, architecture.latent_shape[0] + tokens)
    present = [*module.parameters(), *module.buffers()]
    if backward and accumulating:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                present.append(parameter.grad)
    recorder = Recorder(rows, present)
    with torch.set_grad_enabled(backward), Precision(form.autocast, on_gpu=on_gpu), recorder:
        sample = torch.empty(rows, *architecture.latent_shape, dtype=compute, device="meta")
        # the loss reads the latents before and after the transition
        previous = torch.empty_like(sample)
        outputs = _outputs(architecture, form, module, sample)
        outputs = [output.to(compute).contiguous() for output in outputs]
        if backward:
            # the loss computes its gradients with its value
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.backward(outputs, gradients)
        del previous
    return recorder.trace()


def _denoiser(architecture: Architecture, form: Form) -> Any:
    """Returns the denoiser on ``meta``, without gradients. The latest two are reused."""
    same = replace(form, checkpointing=False, guided=False, compute="", adapter_weights="float32")
    module = _made(architecture, same)
    for parameter in module.parameters():
        parameter.grad = None
        if form.adapter is not None and parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, form.adapter_weights))
    if hasattr(module, "disable_gradient_checkpointing"):
        module.disable_gradient_checkpointing()
    return module


@lru_cache(maxsize=2)
def _made(architecture: Architecture, form: Form) -> Any:
    module: Any = architecture.denoiser.build()
    short = form.attention == "matmul" or (form.attention == "auto" and form.device == "cpu")
    if short and architecture.denoiser.class_name == "UNet2DConditionModel":
        module.set_attn_processor(ShortAttnProcessor())
    set_layers((module,), form.fast_layers, form.channels_last, form.device)
    torch.nn.Module.to(module, getattr(torch, form.weights))  # diffusers' own method warns
    if form.adapter is None:
        return module.requires_grad_(True)
    targets = form.adapter.targets or architecture.family.policy_class().lora_targets
    with torch.device("meta"):
        add_adapter(module, form.adapter, targets, seed=0, dtype=getattr(torch, form.adapter_weights))
    return module


def _outputs(architecture: Architecture, form: Form, module: Any, sample: Tensor) -> list[Tensor]:
    """Returns the denoiser's outputs for M latents, called as its policy does: one, or two under guidance."""
    rows, dtype, config = len(sample), sample.dtype, module.config
    guided = form.guided and not architecture.distilled
    flow = architecture.family.process == "flow"

    def empty(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(rows, *shape, dtype=like, device="meta")

    # no other name holds the text, so that its tensor is free once both halves of guidance are joined
    conditioning = {"encoder_hidden_states": empty(architecture.text_tokens, architecture.text_width)}
    timestep = empty(like=torch.float32 if flow else torch.int64)
    if guided and form.shared_trunk and shares_trunk(module):
        text = conditioning["encoder_hidden_states"]
        return list(guided_forward(module, sample, timestep, text, torch.empty_like(text)))
    if flow:
        conditioning["pooled_projections"] = empty(config.pooled_projection_dim)
        if architecture.distilled:
            conditioning["guidance"] = empty(like=torch.float32)
    elif architecture.denoiser.class_name == "PixArtTransformer2DModel":
        conditioning["encoder_attention_mask"] = empty(architecture.text_tokens, like=torch.int64)
        if config.use_additional_conditions:
            conditioning |= {"resolution": empty(2), "aspect_ratio": empty(1)}
    elif config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditioning |= {"text_embeds": empty(pooled), "time_ids": empty(6)}
    if guided:
        sample, timestep = torch.cat([sample, sample]), torch.cat([timestep, timestep])
        conditioning = {name: torch.cat([value, value]) for name, value in conditioning.items()}
    if architecture.denoiser.class_name == "FluxTransformer2DModel":
        tokens = {"img_ids": sample.shape[1], "txt_ids": architecture.text_tokens}
        conditioning |= {
            name: torch.empty(count, 3, dtype=dtype, device="meta") for name, count in tokens.items()
        }
    output = architecture.family.policy_class().forward(module, sample, timestep, conditioning)
    return list(output.chunk(2)) if guided else [output]
