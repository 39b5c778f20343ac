"""Traces of a run's networks: the denoiser's calls in rollout and replay, and the autoencoder's decoder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopfast.config import Config, LoraConfig, ModelConfig
from loopfast.planning.architectures import Architecture, without_numbers
from loopfast.planning.counting import Precision, Recorder, Trace, rows_to_trace
from loopfast.policies.adapter import add_adapter
from loopfast.policies.fast.guided_unet import guided_forward, shares_trunk
from loopfast.policies.fast.layers import ShortAttnProcessor
from loopfast.policies.fast.switches import set_layers

Device = Literal["cpu", "cuda"]

# Those of the policies, which would load the pipelines of diffusers.
ATTENTION_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0")
JOINT_PROJECTIONS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
)


@dataclass(frozen=True)
class Form:
    """How a denoiser is held and called.

    Attributes:
        device: kind of the device; it decides on layers, attention and autocast.
        adapter: the adapter that is trained; None: all weights.
        weights: type of the weights, apart from those of an adapter.
        adapter_weights: type of those.
        compute: type of the latents and of the activations.
        guided: whether both halves of classifier-free guidance are computed.
        checkpointing: whether activations are recomputed.
        fast_layers, channels_last, attention, shared_trunk: as in ``model``.
    """

    device: Device
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
        """The type to compute in where the weights have another one; frozen weights have it."""
        differs = self.weights != self.compute
        return getattr(torch, self.compute) if differs else None


def form_of(config: Config, device: Device, *, sharded: bool) -> Form:
    """The form in which a configuration trains its denoiser.

    Args:
        config: the run.
        device: kind of its device.
        sharded: whether DeepSpeed holds the float32 weights (ZeRO stages 1 to 3).
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
    """What a denoiser is made of, in numbers.

    Attributes:
        parameters: without an adapter.
        trained: those that training changes.
        buffers: bytes.
        images: numbers in trained convolution kernels, whose layout may be another in memory than in files.
        largest: numbers in the largest weight.
    """

    parameters: int
    trained: int
    buffers: int
    images: int
    largest: int


# Architectures are not hashable (their configurations are dictionaries), and a process plans few of them.
_TRACES: dict[tuple[Any, ...], Any] = {}
_LATEST: dict[str, Any] = {}


def weights_of(architecture: Architecture, form: Form) -> Weights:
    """Counts of a denoiser's weights."""
    key = ("weights", repr(architecture.denoiser), repr(form.adapter))
    if key not in _TRACES:
        module = _denoiser(architecture, form)
        trained = [p for p in module.parameters() if p.requires_grad]
        frozen = [p for p in module.parameters() if not p.requires_grad]
        extra = sum(p.numel() for p in trained) if form.adapter else 0
        _TRACES[key] = Weights(
            parameters=sum(p.numel() for p in (*trained, *frozen)) - extra,
            trained=sum(p.numel() for p in trained),
            buffers=sum(b.numel() * b.element_size() for b in module.buffers()),
            images=sum(p.numel() for p in trained if p.dim() == 4),
            largest=max(p.numel() for p in (*trained, *frozen)),
        )
    found: Weights = _TRACES[key]
    return found


def training_call(architecture: Architecture, form: Form, *, accumulating: bool) -> Trace:
    """Of a forward and backward pass.

    Args:
        architecture: the model.
        form: how it is held.
        accumulating: whether the gradients are there before, and not counted; else the call makes them.
    """
    return _traced(architecture, form, backward=True, accumulating=accumulating)


def sampling_call(architecture: Architecture, form: Form) -> Trace:
    """Of a forward pass without gradients; an adapter counts as float32, which makes little difference."""
    form = replace(form, checkpointing=False, adapter_weights="float32")
    return _traced(architecture, form, backward=False, accumulating=False)


def decoding_call(architecture: Architecture, config: ModelConfig, device: Device) -> Trace:
    """Of the autoencoder's decoder."""
    key = (
        "decode",
        repr(architecture.vae),
        architecture.decoded_shape,
        config.vae_tiling,
        config.fast_layers,
        config.channels_last,
        decoder_type(config),
        device,
    )
    if key not in _TRACES:
        dtype = getattr(torch, decoder_type(config))
        vae: Any = torch.nn.Module.to(architecture.vae.build(), dtype)
        set_layers((vae,), config, torch.device(device))
        if config.vae_tiling:
            vae.enable_tiling()
        rows = rows_to_trace(vae, *architecture.decoded_shape, *architecture.image_shape)
        recorder = Recorder(rows, (*vae.parameters(), *vae.buffers()))
        latents = torch.empty(rows, *architecture.decoded_shape, device="meta")
        with torch.no_grad(), Precision(), recorder:
            latents = (latents / vae.config.scaling_factor).to(dtype)
            images = vae.decode(latents, return_dict=False)[0].float()
            images = (images / 2 + 0.5).clamp(0, 1).contiguous()
        _TRACES[key] = recorder.trace()
    found: Trace = _TRACES[key]
    return found


def decoder_type(config: ModelConfig) -> str:
    """The type that the decoder's weights and activations have."""
    return config.dtype if config.decoder_precision == "model" else "float32"


def _traced(architecture: Architecture, form: Form, *, backward: bool, accumulating: bool) -> Trace:
    shape = (*architecture.latent_shape, architecture.text_tokens)
    key = ("denoise", repr(architecture.denoiser), shape, repr(form), backward, accumulating)
    if key not in _TRACES:
        _TRACES[key] = _trace(architecture, form, backward, accumulating)
    found: Trace = _TRACES[key]
    return found


def _trace(architecture: Architecture, form: Form, backward: bool, accumulating: bool) -> Trace:
    module = _denoiser(architecture, form)
    on_gpu = form.device == "cuda"
    if form.checkpointing:
        # the recomputation happens inside of the backward pass, where the mode around it is not active
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
    kept = (0, 0)
    with (
        torch.set_grad_enabled(backward),
        Precision(form.autocast, on_gpu=on_gpu),
        recorder,
    ):
        sample = torch.empty(rows, *architecture.latent_shape, dtype=compute, device="meta")
        # the latents before and after the transition; the loss reads both
        previous = torch.empty_like(sample)
        outputs = _outputs(architecture, form, module, sample)
        outputs = [output.to(compute).contiguous() for output in outputs]
        if backward:
            kept = recorder.held
            # the loss has its gradients as soon as it is computed
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.backward(outputs, gradients)
        del previous
    return recorder.trace(kept)


def _denoiser(architecture: Architecture, form: Form) -> Any:
    """The denoiser on ``meta``, without gradients; the one of the call before, if it is the same."""
    same = replace(form, checkpointing=False, guided=False, compute="", adapter_weights="")
    key = (repr(architecture.denoiser), repr(same))
    if _LATEST.get("key") != key:
        _LATEST.update(key=key, module=_made(architecture, form))
    module = _LATEST["module"]
    for parameter in module.parameters():
        parameter.grad = None
        if form.adapter is not None and parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, form.adapter_weights))
    if hasattr(module, "disable_gradient_checkpointing"):
        module.disable_gradient_checkpointing()
    return module


def _made(architecture: Architecture, form: Form) -> Any:
    module: Any = architecture.denoiser.build()
    short = form.attention == "matmul" or (form.attention == "auto" and form.device == "cpu")
    if short and architecture.denoiser.class_name == "UNet2DConditionModel":
        module.set_attn_processor(ShortAttnProcessor())
    layers = ModelConfig.model_validate(
        {"pretrained": "-", "fast_layers": form.fast_layers, "channels_last": form.channels_last}
    )
    set_layers((module,), layers, torch.device(form.device))
    torch.nn.Module.to(module, getattr(torch, form.weights))  # past diffusers' own, which warns
    if form.adapter is None:
        return module.requires_grad_(True)
    targets = form.adapter.targets or adapted(architecture.pipeline)
    with without_numbers():
        add_adapter(module, form.adapter, targets, seed=0, dtype=getattr(torch, form.adapter_weights))
    return module


def adapted(pipeline: str) -> tuple[str, ...]:
    """Ends of the names of the modules that get an adapter where the configuration names none."""
    joint = pipeline in ("StableDiffusion3Pipeline", "FluxPipeline")
    return JOINT_PROJECTIONS if joint else ATTENTION_PROJECTIONS


def _outputs(architecture: Architecture, form: Form, module: Any, sample: Tensor) -> list[Tensor]:
    """The denoiser's outputs for M latents, as loopfast's policies call it: one, or two under guidance."""
    rows, dtype = len(sample), sample.dtype
    guided = form.guided and not architecture.distilled

    def empty(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(rows, *shape, dtype=like, device="meta")

    text = empty(architecture.text_tokens, architecture.text_width)
    timestep = empty(like=torch.int64)
    if guided and form.shared_trunk and shares_trunk(module):
        return list(guided_forward(module, sample, timestep, text, torch.empty_like(text)))
    kind, config = architecture.denoiser.class_name, module.config
    extra: dict[str, Tensor] = {}
    if kind in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        timestep = empty(like=torch.float32)
        extra = {"pooled_projections": empty(config.pooled_projection_dim)}
        if architecture.distilled:
            extra["guidance"] = empty(like=torch.float32)
    elif kind == "PixArtTransformer2DModel":
        extra = {"encoder_attention_mask": empty(architecture.text_tokens, like=torch.int64)}
        if config.use_additional_conditions:
            extra |= {"resolution": empty(2), "aspect_ratio": empty(1)}
    elif getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra = {"text_embeds": empty(pooled), "time_ids": empty(6)}
    if guided:
        sample, timestep, text = (torch.cat([part, part]) for part in (sample, timestep, text))
        extra = {name: torch.cat([part, part]) for name, part in extra.items()}
    output = _called(kind, module, sample, timestep, text, extra)
    return list(output.chunk(2)) if guided else [output]


def _called(
    kind: str, module: Any, sample: Tensor, timestep: Tensor, text: Tensor, extra: dict[str, Tensor]
) -> Tensor:
    """The output for rows that all have a prompt, of a denoiser of this class."""
    if kind == "UNet2DConditionModel" and extra:
        extra = {"added_cond_kwargs": extra}  # type: ignore[dict-item]
    elif kind == "PixArtTransformer2DModel":
        conditions = {name: extra.pop(name, None) for name in ("resolution", "aspect_ratio")}
        extra["added_cond_kwargs"] = conditions  # type: ignore[assignment]
    elif kind == "FluxTransformer2DModel":
        timestep = timestep / 1000
        positions = {"img_ids": sample, "txt_ids": text}
        extra |= {
            name: torch.empty(of.shape[1], 3, dtype=sample.dtype, device="meta")
            for name, of in positions.items()
        }
    output: Tensor = module(
        sample, timestep=timestep, encoder_hidden_states=text, return_dict=False, **extra
    )[0]
    return output[:, : sample.shape[1]] if kind == "PixArtTransformer2DModel" else output
