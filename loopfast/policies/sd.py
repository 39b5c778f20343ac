"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, an autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from typing_extensions import override

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies.base import Caller, Conditioning, Policy
from loopfast.policies.guided_unet import guided_forward, plain_forward, shares_trunk
from loopfast.policies.levers import compile_blocks, compile_calls, set_attention, set_layers, set_tf32
from loopfast.policies.loading import first_line, locate, torch_device
from loopfast.policies.portable import save_portable
from loopfast.seeds import derive

ADAPTER = "loopfast"
# Prompts encoded in one call, and the bytes from which on what comes out is kept in the host's memory.
ENCODED_AT_ONCE, LARGE = 64, 256 * 2**20
ATTENTION_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0")


class StableDiffusionPolicy(Policy):
    """A ``StableDiffusionPipeline`` whose UNet, or a LoRA of it, is trained; see :class:`loopfast.policies.Policy`.

    Under full fine-tuning the UNet's weights stay in float32 and ``dtype`` is what it computes in (autocast); under
    LoRA the frozen weights have ``dtype`` and the adapter's are float32; with ``cast`` all have ``dtype``. Text encoder
    and autoencoder are frozen, and the autoencoder computes in float32.

    Raises:
        ConfigError: the pipeline cannot be loaded, no module matches ``model.lora.targets``, or ``model.attention``,
            ``model.compile`` or ``model.tf32`` asks for what is not to be had here.
    """

    def __init__(
        self,
        config: ModelConfig,
        scheduler: Any,
        *,
        seed: int,
        keep_reference: bool,
        cast: bool = False,
        sharded: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.device = torch_device(config.device)
        self.dtype = getattr(torch, config.dtype)
        self._config = config
        try:
            self.pipeline = StableDiffusionPipeline.from_pretrained(
                locate(config),
                revision=config.revision,
                variant=config.variant,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.pretrained: cannot load {config.pretrained!r}: {first_line(error)}"
            ) from error
        self.pipeline.scheduler = scheduler
        self._unet = self.pipeline.unet.requires_grad_(False).eval().float()
        self._text_encoder = (
            self.pipeline.text_encoder.requires_grad_(False).eval().to(self.device, self.dtype)
        )
        self._vae = self.pipeline.vae.requires_grad_(False).eval().to(self.device, torch.float32)
        size = self._unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self._unet.config.in_channels, height, width)

        if config.vae_tiling:
            self._vae.enable_tiling()
        set_tf32(config, self.device)
        attention = set_attention(self._unet, config, self.device, self.dtype)
        fast_layers = set_layers((self._unet, self._vae), config, self.device)
        self.levers = {
            "attention": attention + (" (auto)" if config.attention == "auto" else ""),
            "shared trunk": config.shared_trunk and shares_trunk(self._unet),
            **fast_layers,
            "compile": config.compile,
            "TF32": config.tf32,
        }

        self._base: torch.nn.Module | None = None
        self._caller: Caller | None = None
        home = torch.device("cpu") if sharded else self.device
        trained = self.dtype if cast else torch.float32
        if config.tune == "full":
            if keep_reference:
                self._base = copy.deepcopy(self._unet).to(home, self.dtype)
            self._unet.requires_grad_(True)
            self._unet.to(home, trained)
        else:
            self._unet.to(home, self.dtype)
            self._add_adapter(seed, trained)
        self._active: torch.nn.Module = self._unet
        # now, since an engine that spreads them leaves none whole
        self._parameters = (
            sum(parameter.numel() for parameter in self.trainable().values()),
            sum(parameter.numel() for parameter in self._unet.parameters()),
        )
        self._autocast = config.tune == "full" and self.dtype != trained
        self._unconditional: Conditioning | None = None
        self._encoded: tuple[dict[str, int], Tensor] | None = None
        self._guided, self._plain = guided_forward, plain_forward
        if config.compile == "blocks":
            compile_blocks(self._unet, self.device)
        elif config.compile == "whole":
            self._guided, self._plain = (
                compile_calls(self._guided, self.device),
                compile_calls(self._plain, self.device),
            )

    def _add_adapter(self, seed: int, dtype: torch.dtype) -> None:
        lora = self._config.lora
        targets = list(lora.targets or ATTENTION_PROJECTIONS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "adapter"))
            # peft annotates lora_alpha as an int and divides it by the rank
            adapter = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)  # type: ignore[arg-type]
            try:
                self._unet.add_adapter(adapter, adapter_name=ADAPTER)
            except ValueError as error:
                raise ConfigError(f"model.lora.targets: {targets}: {first_line(error)}") from error
        for parameter in self._unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    @override
    def describe(self) -> str:
        count, total = self._parameters
        what = "UNet" if self._config.tune == "full" else f"LoRA rank {self._config.lora.rank}"
        return f"{self._config.pretrained} ({what}: {count / 1e6:.2f} M of {total / 1e6:.2f} M parameters trained)"

    @override
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self._unet.named_parameters() if p.requires_grad}

    @property
    @override
    def denoiser(self) -> torch.nn.Module:
        return self._active

    @property
    @override
    def reference_denoiser(self) -> torch.nn.Module | None:
        return self._base

    @override
    def hand_over(self, caller: Caller) -> None:
        self._caller = caller

    @override
    def with_denoiser(
        self, denoiser: torch.nn.Module, device: torch.device, dtype: torch.dtype, *, autocast: bool
    ) -> StableDiffusionPolicy:
        if self._unconditional is None:
            self._unconditional = self.encode([""])
        twin = copy.copy(self)
        twin._unet = twin._active = denoiser
        twin.device, twin.dtype, twin._autocast, twin._caller = device, dtype, autocast, None
        twin._unconditional = {name: value.to(device, dtype) for name, value in self._unconditional.items()}
        return twin

    @override
    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        if self._encoded is not None:
            index, states = self._encoded
            rows = states[[index[prompt] for prompt in prompts]]
            return {"encoder_hidden_states": rows.to(self.device)}
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"encoder_hidden_states": self._text_encoder(ids.to(self.device))[0].to(self.dtype)}

    @override
    def free_text_encoder(self, prompts: list[str]) -> None:
        texts = list(dict.fromkeys(["", *prompts]))
        parts = [texts[start : start + ENCODED_AT_ONCE] for start in range(0, len(texts), ENCODED_AT_ONCE)]
        encoded = [self.encode(part)["encoder_hidden_states"] for part in parts]
        large = sum(part.nbytes for part in encoded) > LARGE
        states = torch.cat([part.cpu() for part in encoded] if large else encoded)
        self._encoded = {text: row for row, text in enumerate(texts)}, states
        self.pipeline.register_modules(text_encoder=None)
        self._text_encoder_class = type(self._text_encoder)
        del self._text_encoder

    def _load_text_encoder(self) -> Any:
        return self._text_encoder_class.from_pretrained(
            locate(self._config),
            subfolder="text_encoder",
            revision=self._config.revision or "main",
            variant=self._config.variant,
            use_safetensors=True,
        ).to(self.dtype)

    @override
    def enable_gradient_checkpointing(self) -> None:
        self._unet.enable_gradient_checkpointing()

    @override
    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        text = conditioning["encoder_hidden_states"]
        if guidance_scale == 1.0:
            return self._denoise(sample, timestep, text), None
        if self._unconditional is None:
            self._unconditional = self.encode([""])
        empty = self._unconditional["encoder_hidden_states"].expand_as(text)
        if self._config.shared_trunk and shares_trunk(self._active):
            with self._precision():
                conditional, unconditional = self._call(self._guided, sample, timestep, text, empty)
            return conditional.to(self.dtype).contiguous(), unconditional.to(self.dtype).contiguous()
        both = self._denoise(
            torch.cat([sample, sample]), torch.cat([timestep, timestep]), torch.cat([text, empty])
        )
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    def _denoise(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        with self._precision():
            output = self._call(self._plain, sample, timestep, text)
        result: Tensor = output.to(self.dtype).contiguous()
        return result

    def _call(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        if self._caller is None:
            return function(self._active, *inputs)
        return self._caller.call(self._active, function, *inputs)

    def _precision(self) -> AbstractContextManager[object]:
        if not self._autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    @override
    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._config.tune == "lora":
            self._unet.disable_adapters()
            try:
                yield
            finally:
                self._unet.enable_adapters()
            return
        if self._base is None:
            raise RuntimeError("the policy was loaded with keep_reference=False")
        self._active = self._base
        try:
            yield
        finally:
            self._active = self._unet

    @override
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images = self._vae.decode(latents.float() / self._vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).contiguous()

    @override
    def export(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        if self._config.tune == "full":
            # a UNet around these weights: the trained one may hold but a part of them, or layers of other classes
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(self._unet.config)
            unet.load_state_dict(dict(weights), assign=True)
            released = self.pipeline.text_encoder is None
            if released:
                self.pipeline.register_modules(text_encoder=self._load_text_encoder())
            self.pipeline.register_modules(unet=unet)
            try:
                save_portable(self.pipeline, directory)
            finally:
                self.pipeline.register_modules(unet=self._unet)
            if released:
                self.pipeline.register_modules(text_encoder=None)
            return
        # readers take alpha to be the rank unless told, each release in its own way: the factor goes into the weights
        factor = self._config.lora.alpha / self._config.lora.rank
        layers = get_peft_model_state_dict(self._unet, state_dict=dict(weights), adapter_name=ADAPTER)
        StableDiffusionPipeline.save_lora_weights(
            directory,
            unet_lora_layers={
                name: value * factor if "lora_B" in name else value for name, value in layers.items()
            },
        )
