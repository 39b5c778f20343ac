"""The base class of the policies of all diffusers pipelines."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from typing_extensions import override

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, as_config_error
from loopfast.policies.adapter import add_adapter, exported_adapter, merge_adapter, without_adapter
from loopfast.policies.base import Conditioning, ForwardWrapper, Policy, call_denoiser
from loopfast.policies.families import Family
from loopfast.policies.fast import switches
from loopfast.policies.fast.guided_unet import shares_trunk
from loopfast.policies.loading import TEXT_ENCODERS, model_index
from loopfast.policies.lora_file import Lora, load_lora, read_lora
from loopfast.policies.portable import save_portable
from loopfast.policies.resolution import decoder_rows, latent_size
from loopfast.policies.schedulers import load_scheduler
from loopfast.policies.single_file import load_single_file
from loopfast.policies.source import find_source
from loopfast.policies.text_limits import TOKENIZERS, TextLimit, encoder_of
from loopfast.system.device import torch_device

# Number of prompts to encode in one call; bytes above which encodings are kept in the host's memory.
ENCODED_AT_ONCE, LARGE = 64, 256 * 2**20
# Joint attention of image and text tokens: the projections of both, as Flow-GRPO's recipes train them.
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class PipelinePolicy(Policy):
    """A diffusers pipeline whose denoiser, or a LoRA of it, is trained; see :class:`loopfast.policies.Policy`.

    With full fine-tuning the denoiser's weights stay in float32 and it computes in ``dtype`` (autocast). With LoRA the
    frozen weights have ``dtype`` and the adapter's are float32, rounded to ``dtype`` for each product. With ``cast``
    all weights have ``dtype``. The text encoders and the autoencoder are frozen, and the autoencoder computes as
    ``decoder_precision`` says.

    A family's class implements the encoding of prompts (:meth:`_encode`), and overrides the call of the denoiser
    (:meth:`forward`) and the defaults here that are not its own.

    The other arguments are those of `loopfast.policies.load_policy`.

    Raises:
        ConfigError: the pipeline cannot be loaded, no module matches ``model.lora.targets``, or another key of
            ``model`` asks for something that this model or machine does not have.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("to_k", "to_q", "to_v", "to_out.0")
    """Ends of the names of the modules that get an adapter, if the configuration names none."""
    load_options: ClassVar[dict[str, Any]] = {}
    """Further arguments of ``from_pretrained``."""
    sequence_length: ClassVar[int | None] = None
    """Number of tokens that a T5 encoder reads by default; None without such an encoder."""
    t5_tokenizer: ClassVar[str | None] = None
    """The name of the T5 encoder's tokenizer; other tokenizers are CLIP's."""
    lowers_prompts: ClassVar[bool] = False
    """True if the pipeline turns a prompt into lower case."""

    def __init__(
        self,
        config: ModelConfig,
        family: Family,
        *,
        seed: int,
        keep_reference: bool,
        cast: bool = False,
        sharded: bool = False,
    ) -> None:
        self.scheduler = load_scheduler(config)
        self.device = torch_device(config.device)
        self.dtype = getattr(torch, config.dtype)
        self._config, self._family = config, family
        self._refuse()
        switches.set_arithmetic(config, self.device)
        trained = self.dtype if cast else torch.float32
        self.pipeline = self.load_pipeline(config, family)
        self.pipeline.register_modules(scheduler=self.scheduler)
        self._denoiser = getattr(self.pipeline, family.denoiser).requires_grad_(False).eval()
        encoders = self._text_encoders()
        for name in encoders:
            getattr(self.pipeline, name).requires_grad_(False).eval().to(self.device)
        tokenizers = {
            name: getattr(self.pipeline, name) for name in TOKENIZERS if encoder_of(name) in encoders
        }
        self.text_limits = self.limits_of(config, type(self.pipeline).__name__, tokenizers)
        self._vae = self._decoder()
        size = latent_size(config, family, self._denoiser.config, self._vae.config)
        self.latent_shape: tuple[int, ...] = (self._denoiser.config.in_channels, *size)
        self.decoder_rows = decoder_rows(self._vae.config, size)
        self._accelerate()

        self._start: Lora | None = None
        self.reference_denoiser = None
        self._wrapper: ForwardWrapper | None = None
        home = torch.device("cpu") if sharded else self.device
        if config.tune == "full":
            if keep_reference:
                self.reference_denoiser = copy.deepcopy(self._denoiser).to(home, self.dtype)
            self._denoiser.requires_grad_(True)
            self._denoiser.to(home, trained)
        else:
            self._denoiser.to(home, self.dtype)
            self._add_adapter(seed, trained)
        self.denoiser = self._denoiser
        # counted here, before an engine shards them
        self._parameters = (
            sum(parameter.numel() for parameter in self.trainable().values()),
            sum(parameter.numel() for parameter in self._denoiser.parameters()),
        )
        self._autocast = config.tune == "full" and self.dtype != trained
        self._encoded: tuple[dict[str, int], Conditioning] | None = None
        self._released: list[str] = []
        self._plain = self._compiled(self.forward)

    def _refuse(self) -> None:
        """Raises `ConfigError` if the configuration asks for something that this family does not have."""
        if self._config.lora.text_encoder and not self._family.lora_of_text:
            raise ConfigError(
                f"model.lora.text_encoder: found true, allowed: false with {self._family.title}; adapters of text "
                "encoders are for Stable Diffusion 1.x and 2.x"
            )
        if self._config.max_sequence_length is not None and self.sequence_length is None:
            raise ConfigError(
                f"model.max_sequence_length: found {self._config.max_sequence_length}, allowed: null with "
                f"{self._family.title}, which has no T5 encoder"
            )

    @classmethod
    def load_pipeline(cls, config: ModelConfig, family: Family, *without: str) -> Any:
        """Loads the pipeline before training, without its scheduler and the components named in ``without``."""
        # the base of an adapter is loaded in its final type; the autoencoder computes in float32 anyway
        dtype = getattr(torch, config.dtype)
        types = {"vae": torch.float32, "default": dtype}
        if config.tune == "full":
            types[family.denoiser] = torch.float32
        # the model's own scheduler is replaced, and its class may need packages that are not installed
        absent = [name for name, entry in model_index(config).items() if entry == [None, None]]
        options = {**dict.fromkeys((*absent, *without, "scheduler")), **cls.load_options}
        source = find_source(config)
        failed = f"model.pretrained: cannot load {config.pretrained!r}"
        with as_config_error(failed, OSError, ValueError, KeyError, RuntimeError):
            if source.file is not None:
                loaded = load_single_file(
                    family.pipeline_class(), source.file, source.pipeline, config.revision, options
                )
                for name, part in loaded.components.items():
                    if isinstance(part, torch.nn.Module):
                        part.to(types.get(name, dtype))
                return loaded
            return DiffusionPipeline.from_pretrained(
                source.pipeline,
                revision=config.revision,
                variant=config.variant,
                # None reads pickled files if there are no others
                use_safetensors=None if config.allow_pickle else True,
                torch_dtype=types,
                **options,
            )

    def _decoder(self) -> Any:
        """Returns the autoencoder that decodes: the pipeline's, or a copy in the denoiser's type, never exported."""
        vae = self.pipeline.vae.requires_grad_(False).eval()
        self._precision_of_decoder = switches.decoder_precision(self._config, self.device, vae.config)
        if self._precision_of_decoder == "model" and self.dtype != torch.float32:
            return copy.deepcopy(vae).to(self.device, self.dtype)
        return vae.to(self.device, torch.float32)

    def _accelerate(self) -> None:
        """Sets the performance options of the configuration, which leave the mathematics alone."""
        config = self._config
        if config.vae_tiling:
            self._vae.enable_tiling()
        is_unet = isinstance(self._denoiser, UNet2DConditionModel)
        attention = switches.set_attention(self._denoiser, config, self.device, self.dtype)
        networks = (self._denoiser, self._vae) if is_unet else (self._vae,)
        layers = switches.set_layers(networks, config.fast_layers, config.channels_last, self.device.type)
        if self._precision_of_decoder == "tf32":
            switches.use_tf32_convolutions(self._vae)
        self.performance_options = {
            "attention": attention + (" (auto)" if config.attention == "auto" else ""),
            "shared trunk": config.shared_trunk and shares_trunk(self._denoiser),
            # options of the denoiser; a transformer has neither
            **{name: is_unet and used for name, used in layers.items()},
            "compile": config.compile,
            "TF32": config.tf32,
            "decoder": self._precision_of_decoder,
            "deterministic": config.deterministic,
        }
        if config.compile != "off":
            switches.prepare_compiling(self.device)
        if config.compile == "blocks":
            # all calls of a run have one batch size
            self._denoiser.compile_repeated_blocks(dynamic=False)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of a denoiser and its inputs, compiled if ``model.compile`` says so."""
        if self._config.compile == "whole":
            # at its first calls, once for each shape
            function = torch.compile(function, dynamic=False)
        return function if self._config.compile == "off" else switches.with_one_graph(function)

    def _add_adapter(self, seed: int, dtype: torch.dtype) -> None:
        if self._config.lora.from_ is not None:
            self._start = read_lora(self._config, self._family)
        self._adapt(self._family.denoiser, self._config.lora.targets or self.lora_targets, seed, dtype)

    def _adapt(self, component: str, targets: tuple[str, ...], seed: int, dtype: torch.dtype) -> None:
        """Adds an adapter to a component, with the weights that ``model.lora.from`` has for it."""
        network, settings = getattr(self.pipeline, component), self._config.lora
        add_adapter(network, settings, targets, seed=seed, dtype=dtype)
        if self._start is not None and component in self._start.layers:
            load_lora(network, self._start.layers[component], settings)

    def _text_encoders(self) -> list[str]:
        """Returns the names of the pipeline's text encoders."""
        return [name for name in TEXT_ENCODERS if getattr(self.pipeline, name, None) is not None]

    @staticmethod
    def forward(
        denoiser: torch.nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Returns a denoiser's outputs ``[M, *L]`` for latents ``[M, *L]`` at timesteps ``[M]`` and their prompts."""
        return call_denoiser(denoiser, sample, timestep, conditioning)

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Encodes prompts by the pipeline's text encoders."""

    @cached_property
    def _unconditional(self) -> Conditioning:
        """The conditioning of guidance's unconditional half, one row."""
        return self.encode([""])

    @property
    def max_sequence_length(self) -> int | None:
        """The number of tokens that a T5 encoder reads."""
        return self.t5_tokens(self._config, type(self.pipeline).__name__)

    @classmethod
    def t5_tokens(cls, config: ModelConfig, pipeline: str) -> int | None:
        """Returns the number of tokens that a T5 encoder reads in a pipeline of this class's name."""
        return config.max_sequence_length or cls.sequence_length

    @classmethod
    def limits_of(
        cls, config: ModelConfig, pipeline: str, tokenizers: Mapping[str, Any]
    ) -> tuple[TextLimit, ...]:
        """Returns the number of tokens that each text encoder reads, once for encoders with equal tokenizers.

        It takes the name of the pipeline's class, and the tokenizers by the component's name.
        """
        limits: dict[tuple[str, int, int], TextLimit] = {}
        for name, tokenizer in tokenizers.items():
            t5_tokens = cls.t5_tokens(config, pipeline) if name == cls.t5_tokenizer else None
            encoder, tokens = ("T5", t5_tokens) if t5_tokens else ("CLIP", tokenizer.model_max_length)
            limit = TextLimit(encoder, tokens, tokenizer, cls.lowers_prompts)
            limits.setdefault((encoder, tokens, len(tokenizer)), limit)
        return tuple(limits.values())

    @override
    def describe(self) -> str:
        count, total = self._parameters
        lora, what = self._config.lora, self._family.denoiser.replace("unet", "UNet")
        if self._config.tune == "lora":
            what = f"{'DoRA' if lora.dora else 'LoRA'} rank {lora.rank}"
        if self._start is not None:
            trained = {self._family.denoiser, "text_encoder" if lora.text_encoder else ""}
            unused = sorted({*self._start.unused, *self._start.layers} - trained)
            without = f", without its adapter of {' and '.join(unused)}" if unused else ""
            what += f" from {lora.from_}{without}"
        return f"{self._config.pretrained} ({what}: {count / 1e6:.2f} M of {total / 1e6:.2f} M parameters trained)"

    @override
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self._denoiser.named_parameters() if p.requires_grad}

    @override
    def attach_engine(self, wrapper: ForwardWrapper) -> None:
        self._wrapper = wrapper

    @override
    def with_denoiser(
        self, denoiser: torch.nn.Module, device: torch.device, dtype: torch.dtype, *, autocast: bool
    ) -> PipelinePolicy:
        unconditional = self._unconditional
        twin = copy.copy(self)
        twin._denoiser = twin.denoiser = denoiser
        twin.device, twin.dtype, twin._autocast, twin._wrapper = device, dtype, autocast, None
        twin._unconditional = {name: _moved(value, device, dtype) for name, value in unconditional.items()}
        return twin

    @override
    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        if self._encoded is not None:
            index, encoded = self._encoded
            rows = [index[prompt] for prompt in prompts]
            return {name: value[rows].to(self.device) for name, value in encoded.items()}
        found = self._encode(prompts)
        return {name: _moved(value, self.device, self.dtype) for name, value in found.items()}

    @override
    def free_text_encoder(self, prompts: list[str]) -> None:
        texts = list(dict.fromkeys(["", *prompts]))
        parts = [
            self.encode(texts[start : start + ENCODED_AT_ONCE])
            for start in range(0, len(texts), ENCODED_AT_ONCE)
        ]
        large = sum(value.nbytes for part in parts for value in part.values()) > LARGE
        encoded = {
            name: torch.cat([part[name].cpu() if large else part[name] for part in parts])
            for name in parts[0]
        }
        self._encoded = {text: row for row, text in enumerate(texts)}, encoded
        self._released = self._text_encoders()
        self.pipeline.register_modules(**dict.fromkeys(self._released))

    @contextmanager
    def _with_text_encoders(self) -> Iterator[None]:
        """Context in which the pipeline has the released text encoders again."""
        if self._released:
            loaded = self.load_pipeline(self._config, self._family, self._family.denoiser, "vae")
            self.pipeline.register_modules(**{name: getattr(loaded, name) for name in self._released})
        try:
            yield
        finally:
            self.pipeline.register_modules(**dict.fromkeys(self._released))

    @override
    def enable_gradient_checkpointing(self) -> None:
        getattr(self.pipeline, self._family.denoiser).enable_gradient_checkpointing()

    @override
    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        if guidance_scale == 1.0:
            return self._denoise(sample, timestep, conditioning), None
        both = {
            name: torch.cat([value, self._unconditional[name].expand_as(value)])
            for name, value in conditioning.items()
        }
        outputs = self._denoise(torch.cat([sample, sample]), torch.cat([timestep, timestep]), both)
        conditional, unconditional = outputs.chunk(2)
        return conditional, unconditional

    def _denoise(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        result: Tensor = self._call(self._plain, sample, timestep, conditioning).to(self.dtype).contiguous()
        return result

    def _call(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Calls a function of the denoiser, by the engine that owns its weights if there is one, with autocast."""
        autocast: AbstractContextManager[object] = nullcontext()
        if self._autocast:
            autocast = torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)
        with autocast:
            if self._wrapper is None:
                return function(self.denoiser, *inputs)
            return self._wrapper.call(self.denoiser, function, *inputs)

    @override
    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._config.tune == "lora":
            with without_adapter(self._denoiser):
                yield
            return
        if self.reference_denoiser is None:
            raise RuntimeError("the policy was loaded with keep_reference=False")
        self.denoiser = self.reference_denoiser
        try:
            yield
        finally:
            self.denoiser = self._denoiser

    @cached_property
    def _channel_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of the latents' channels, ``[1, C, 1, 1]``; cached, as a copy to a GPU waits for it."""
        found = [self._vae.config.get(name) for name in ("latents_mean", "latents_std")]
        if None in found:
            return None
        mean, std = (torch.tensor(values, device=self._vae.device).view(1, -1, 1, 1) for values in found)
        return mean, std

    @override
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        config = self._vae.config
        latents = latents.float()
        if self._channel_statistics is not None:
            mean, std = self._channel_statistics
            latents = latents * (std / config.scaling_factor) + mean
        else:
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        images = self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1).contiguous()

    @override
    def export(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        if self._config.tune == "full":
            self._save_pipeline(directory, weights)
        else:
            self._save_adapter(directory, weights)

    @override
    def export_merged(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        if self._config.tune == "full":
            self._save_pipeline(directory, weights)
        else:
            merged = self._merged(weights)
            self._save_pipeline(directory, merged.state_dict(), merged)

    def _merged(self, weights: Mapping[str, Tensor]) -> Any:
        """Returns a copy of the denoiser in which the adapter of these weights is merged."""
        merged = copy.deepcopy(self._denoiser)
        merged.load_state_dict(dict(weights), strict=False)
        merge_adapter(merged)
        return merged

    def _save_pipeline(
        self,
        directory: Path,
        weights: Mapping[str, Tensor],
        like: torch.nn.Module | None = None,
        **others: torch.nn.Module,
    ) -> None:
        """Writes the whole pipeline with a denoiser of these weights, and with other components in ``others``.

        The denoiser is made anew: the trained one may hold only a shard of its weights, or layers of other classes.
        """
        name = self._family.denoiser
        trained = getattr(self.pipeline, name)
        with torch.device("meta"):
            denoiser = type(trained).from_config(trained.config)
        like = trained if like is None else like
        buffers = {key: value for key, value in like.named_buffers() if key in denoiser.state_dict()}
        denoiser.load_state_dict({**buffers, **weights}, assign=True)
        written = {name: denoiser, **others}
        with self._with_text_encoders():
            own = {key: getattr(self.pipeline, key) for key in written}
            self.pipeline.register_modules(**written)
            try:
                save_portable(self.pipeline, directory)
            finally:
                self.pipeline.register_modules(**own)

    def _save_adapter(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        layers = exported_adapter(self._denoiser, self._config.lora, weights)
        self.pipeline.save_lora_weights(directory, **{f"{self._family.denoiser}_lora_layers": layers})


def _moved(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the tensor on a device, and in a type unless it holds whole numbers or a mask."""
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
