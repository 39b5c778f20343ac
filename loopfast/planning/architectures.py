"""What a pipeline consists of: the configuration of each component, and the component without memory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, first_line
from loopfast.policies.families import Family, family_of
from loopfast.policies.resolution import latent_size
from loopfast.policies.source import locate

_MODELS = resources.files("loopfast.planning") / "models"

# Of each pipeline the key of its denoiser and those of its text encoders.
_DENOISERS = ("unet", "transformer")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_DENOISER_CLASSES = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
)

# Tokens that diffusers' pipelines ask of T5 unless told otherwise (max_sequence_length).
T5_TOKENS = {
    "StableDiffusion3Pipeline": 256,
    "FluxPipeline": 512,
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
}


class _Uninitialized(TorchFunctionMode):
    """Leaves new weights as they are: on ``meta`` their first values would be worked out in vain, in Python."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALIZERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_INITIALIZERS = {
    torch.nn.init.constant_,
    torch.nn.init.kaiming_uniform_,
    torch.nn.init.normal_,
    torch.nn.init.uniform_,
    torch.Tensor.fill_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.zero_,
}


@contextmanager
def without_numbers() -> Iterator[None]:
    """Inside, networks are made on the device ``meta``, and their weights get no first values."""
    with torch.device("meta"), _Uninitialized():
        yield


@dataclass(frozen=True)
class Component:
    """A network by the name of its class in diffusers or transformers, and the configuration it is made from."""

    class_name: str
    config: dict[str, Any]

    def build(self) -> torch.nn.Module:
        """The network on the device ``meta``: shapes and types, no memory.

        Raises:
            ConfigError: its class or its configuration is unknown to the libraries.
        """
        try:
            with without_numbers():
                module = self._make()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"model.pretrained: cannot make a {self.class_name} from its configuration: {first_line(error)}"
            ) from error
        return module.requires_grad_(False).eval()

    def _make(self) -> Any:
        diffusers = importlib.import_module("diffusers")
        if hasattr(diffusers, self.class_name):
            return getattr(diffusers, self.class_name).from_config(self.config)
        transformers = importlib.import_module("transformers")
        model = getattr(transformers, self.class_name)
        return model(model.config_class(**self.config))

    def parameters(self) -> int:
        """How many numbers its weights are."""
        return _count(self.class_name, json.dumps(self.config, sort_keys=True))


@cache
def _count(class_name: str, config: str) -> int:
    return sum(p.numel() for p in Component(class_name, json.loads(config)).build().parameters())


@dataclass(frozen=True)
class Architecture:
    """The components of a pipeline that a run holds.

    Attributes:
        name: as it was asked for.
        title: what it is called.
        pipeline: the class of the pipeline.
        denoiser, vae, text_encoders: its networks.
        size: height and width of the autoencoder's latents.
        t5_tokens: that a T5 encoder reads of a prompt; None: as many as the pipeline asks for.
    """

    name: str
    title: str
    pipeline: str
    denoiser: Component
    vae: Component
    text_encoders: tuple[Component, ...]
    size: tuple[int, int]
    t5_tokens: int | None = None

    @property
    def trainable(self) -> bool:
        """Whether this release trains it; others can be planned only."""
        return family_of(self.pipeline) is not None

    @property
    def distilled(self) -> bool:
        """Whether it is told the guidance scale, and called once."""
        return bool(self.denoiser.config.get("guidance_embeds"))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent as it is sampled: ``(channels, height, width)``; ``(tokens, channels)`` where it is packed."""
        channels = self.denoiser.config["in_channels"]
        height, width = self.size
        if self.pipeline == "FluxPipeline":
            return (height // 2 * (width // 2), channels)
        return channels, height, width

    @property
    def decoded_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of what the autoencoder makes an image of."""
        return self.vae.config.get("latent_channels", 4), *self.size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of one decoded image."""
        config = self.vae.config
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        height, width = self.size
        return config["out_channels"], height * factor, width * factor

    @property
    def text_tokens(self) -> int:
        """Rows of a prompt's encoding."""
        lengths = [int(encoder.config.get("max_position_embeddings", 0)) for encoder in self.text_encoders]
        if self.pipeline not in T5_TOKENS:
            return lengths[0] if lengths and lengths[0] else 77
        tokens = self.t5_tokens or T5_TOKENS[self.pipeline]
        # only Stable Diffusion 3 puts CLIP's rows before those of T5
        return tokens + (max(lengths) or 77 if self.pipeline == "StableDiffusion3Pipeline" else 0)

    @property
    def text_width(self) -> int:
        """Columns of a prompt's encoding."""
        config = self.denoiser.config
        widths = (
            config.get(name) for name in ("joint_attention_dim", "caption_channels", "cross_attention_dim")
        )
        return int(next(width for width in widths if width))


def known() -> dict[str, tuple[str, ...]]:
    """Names of the architectures that come with the package, and the repositories that hold such models."""
    files = [entry.name for entry in _MODELS.iterdir() if entry.name.endswith(".json")]
    names = sorted(name.removesuffix(".json") for name in files)
    return {name: tuple(_packaged(f"{name}.json")["hub"]) for name in names}


@cache
def _packaged(file: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((_MODELS / file).read_text("utf-8"))
    return document


def load_architecture(config: ModelConfig, name: str | None = None) -> Architecture:
    """The architecture of a configuration's model, or one that comes with the package.

    Args:
        config: the section ``model``.
        name: one of `known`; None: that of ``model.pretrained``.

    Raises:
        ConfigError: there is none of that name, or the model's configuration cannot be found or is of another kind.
    """
    packaged = known()
    if name is not None and name not in packaged:
        raise ConfigError(f"--model: found {name!r}, allowed: {', '.join(packaged)}")
    if name is None:
        place = locate(config)
        if isinstance(place, str):
            name = next((key for key, hub in packaged.items() if place in hub), None)
    if name is None:
        return _of_pipeline(config)
    document = _packaged(f"{name}.json")

    def component(part: dict[str, Any]) -> Component:
        return Component(part["class"], part["config"])

    encoders = tuple(component(part) for part in document["text_encoders"])
    denoiser, vae = component(document["denoiser"]), component(document["vae"])
    return _architecture(config, name, document["title"], document["pipeline"], denoiser, vae, encoders)


def _architecture(
    config: ModelConfig,
    name: str,
    title: str,
    pipeline: str,
    denoiser: Component,
    vae: Component,
    encoders: tuple[Component, ...],
) -> Architecture:
    # a pipeline that cannot be trained is planned by what its denoiser's configuration says
    family = family_of(pipeline) or Family((pipeline,), pipeline, "", "unet")
    size = latent_size(config, family, denoiser.config, vae.config)
    return Architecture(name, title, pipeline, denoiser, vae, encoders, size, config.max_sequence_length)


def _of_pipeline(config: ModelConfig) -> Architecture:
    """From the configuration files of a folder or a repository."""
    source = locate(config)
    read = _reader(config, source)
    index = read("model_index.json", "", "")
    parts = {
        key: str(entry[1])
        for key, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    denoiser = next((key for key in _DENOISERS if key in parts), None)
    if denoiser is None or "vae" not in parts:
        _refuse(config, f"its model_index.json names no {' or '.join(_DENOISERS)} with a vae")
    if parts[denoiser] not in _DENOISER_CLASSES:
        _refuse(config, f"its denoiser is a {parts[denoiser]}; supported: {', '.join(_DENOISER_CLASSES)}")

    def component(key: str) -> Component:
        return Component(parts[key], read("config.json", key, parts[key]))

    return _architecture(
        config,
        config.pretrained,
        config.pretrained,
        str(index.get("_class_name")),
        component(denoiser),
        component("vae"),
        tuple(component(key) for key in _TEXT_ENCODERS if key in parts),
    )


def _reader(config: ModelConfig, source: Path | str) -> Callable[[str, str, str], dict[str, Any]]:
    """Reads one configuration file of a pipeline: ``(file, subfolder, class name)``."""

    def read(file: str, subfolder: str, class_name: str) -> dict[str, Any]:
        try:
            if isinstance(source, Path):
                found = json.loads((source / subfolder / file).read_text("utf-8"))
            else:
                found = _from_hub(source, config.revision, subfolder, class_name)
        except (OSError, ValueError) as error:
            name = f"{subfolder}/{file}" if subfolder else file
            raise ConfigError(
                f"model.pretrained: cannot read {name} of {config.pretrained!r}: {first_line(error)}; --model takes "
                f"one of {', '.join(known())} instead"
            ) from error
        if not isinstance(found, dict):
            _refuse(config, f"{file} holds no mapping")
        return found

    return read


def _from_hub(repository: str, revision: str | None, subfolder: str, class_name: str) -> dict[str, Any]:
    """A configuration file, without the weights beside it."""
    import diffusers
    import transformers

    if not subfolder:
        return dict(diffusers.DiffusionPipeline.load_config(repository, revision=revision))
    if hasattr(diffusers, class_name):
        model = getattr(diffusers, class_name)
        return dict(model.load_config(repository, subfolder=subfolder, revision=revision))
    config = transformers.AutoConfig.from_pretrained(
        repository, subfolder=subfolder, revision=revision or "main"
    )
    found: dict[str, Any] = config.to_dict()
    return found


def _refuse(config: ModelConfig, reason: str) -> NoReturn:
    raise ConfigError(f"model.pretrained: {config.pretrained!r} cannot be planned: {reason}")
