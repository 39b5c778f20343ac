"""The components of a pipeline: the configuration of each, and its network without memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, first_line
from loopfast.policies.families import Family, family_of
from loopfast.policies.resolution import latent_size
from loopfast.policies.source import locate

_MODELS = resources.files("loopfast.planning") / "models"

_DENOISERS = ("unet", "transformer")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

# The pipeline whose policy calls a denoiser of this class.
_PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
}


@dataclass(frozen=True)
class Component:
    """A network: the name of its class in diffusers or transformers, and the configuration that it is made from."""

    class_name: str
    config: dict[str, Any] = field(hash=False)

    def build(self) -> torch.nn.Module:
        """Returns the network on the device ``meta``, which has shapes and types but no memory.

        Raises:
            ConfigError: the libraries do not know its class, or refuse its configuration.
        """
        import diffusers
        import transformers

        try:
            with torch.device("meta"):
                module: Any
                if hasattr(diffusers, self.class_name):
                    module = getattr(diffusers, self.class_name).from_config(self.config)
                else:
                    model = getattr(transformers, self.class_name)
                    module = model(model.config_class(**self.config))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"model.pretrained: cannot make a {self.class_name} from its configuration: {first_line(error)}"
            ) from error
        return module.requires_grad_(False).eval()

    def parameters(self) -> int:
        """Returns the number of its parameters."""
        return _count(self)


@cache
def _count(component: Component) -> int:
    return sum(parameter.numel() for parameter in component.build().parameters())


@dataclass(frozen=True)
class Architecture:
    """The components of a pipeline that a run holds.

    Attributes:
        name: its name in the package, or ``model.pretrained``.
        title: its name for people.
        pipeline: the class of the pipeline.
        family: the family whose policy calls the denoiser.
        denoiser, vae, text_encoders: its networks.
        size: height and width of the autoencoder's latents.
        t5_tokens: the number of tokens that a T5 encoder reads; None if there is no T5 encoder.
    """

    name: str
    title: str
    pipeline: str
    family: Family
    denoiser: Component
    vae: Component
    text_encoders: tuple[Component, ...]
    size: tuple[int, int]
    t5_tokens: int | None

    @property
    def trainable(self) -> bool:
        """True if this release trains it. Other pipelines can only be planned."""
        return family_of(self.pipeline) is not None

    @property
    def distilled(self) -> bool:
        """True if the denoiser takes the guidance scale as an input, and is called once."""
        return bool(self.denoiser.config.get("guidance_embeds"))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sampled latent: ``(channels, height, width)``, or ``(tokens, channels)`` if packed."""
        channels = self.denoiser.config["in_channels"]
        height, width = self.size
        if self.denoiser.class_name == "FluxTransformer2DModel":
            return (height // 2 * (width // 2), channels)
        return channels, height, width

    @property
    def decoded_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the autoencoder's latent of one image."""
        return self.vae.config.get("latent_channels", 4), *self.size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of one decoded image."""
        config = self.vae.config
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        height, width = self.size
        return config["out_channels"], height * factor, width * factor

    @property
    def text_parameters(self) -> int:
        """The number of parameters of all text encoders."""
        return sum(encoder.parameters() for encoder in self.text_encoders)

    @property
    def text_tokens(self) -> int:
        """The number of rows of a prompt's encoding."""
        lengths = [int(encoder.config.get("max_position_embeddings", 0)) for encoder in self.text_encoders]
        if self.t5_tokens is None:
            return lengths[0] if lengths and lengths[0] else 77
        # only Stable Diffusion 3 has CLIP's rows before those of T5
        joined = self.denoiser.class_name == "SD3Transformer2DModel"
        return self.t5_tokens + (max(lengths) or 77 if joined else 0)

    @property
    def text_width(self) -> int:
        """The number of columns of a prompt's encoding."""
        names = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
        return int(next(self.denoiser.config[name] for name in names if self.denoiser.config.get(name)))


def known() -> dict[str, tuple[str, ...]]:
    """Returns the names of the package's architectures, each with the repositories that hold such models."""
    return {name: tuple(document["hub"]) for name, document in sorted(_packaged().items())}


@cache
def _packaged() -> dict[str, dict[str, Any]]:
    files = [entry for entry in _MODELS.iterdir() if entry.name.endswith(".json")]
    return {file.name.removesuffix(".json"): json.loads(file.read_text("utf-8")) for file in files}


def load_architecture(config: ModelConfig, name: str | None = None) -> Architecture:
    """Returns the architecture with a name, one of `known`; None takes that of the configuration's model.

    Raises:
        ConfigError: no architecture has that name, or the model's configuration cannot be read or planned.
    """
    packaged = known()
    if name is not None and name not in packaged:
        raise ConfigError(f"--model: found {name!r}, allowed: {', '.join(packaged)}")
    if name is None:
        place = locate(config)
        if isinstance(place, str):
            name = next((key for key, hub in packaged.items() if place in hub), None)
    document = _described(config) if name is None else _packaged()[name]

    denoiser, vae, *encoders = (
        Component(part["class"], part["config"])
        for part in (document["denoiser"], document["vae"], *document["text_encoders"])
    )
    sdxl = denoiser.config.get("addition_embed_type") == "text_time"
    # the denoiser decides, so that pipelines of no family can be planned
    family = family_of("StableDiffusionXLPipeline" if sdxl else _PIPELINES[denoiser.class_name])
    assert family is not None
    policy, pipeline = family.policy_class(), document["pipeline"]
    return Architecture(
        name or config.pretrained,
        document["title"],
        pipeline,
        family,
        denoiser,
        vae,
        tuple(encoders),
        latent_size(config, family, denoiser.config, vae.config),
        policy.t5_tokens(config, pipeline) if policy.sequence_length else None,
    )


def _described(config: ModelConfig) -> dict[str, Any]:
    """Returns the configuration files of a folder or a repository in the form of the package's documents."""
    index = _read(config, "model_index.json")
    classes = {
        key: str(entry[1])
        for key, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    denoiser = next((key for key in _DENOISERS if key in classes), None)
    if denoiser is None or "vae" not in classes:
        _refuse(config, f"its model_index.json names no {' or '.join(_DENOISERS)} with a vae")
    if classes[denoiser] not in _PIPELINES:
        _refuse(config, f"its denoiser is a {classes[denoiser]}; supported: {', '.join(_PIPELINES)}")

    def part(key: str) -> dict[str, Any]:
        return {"class": classes[key], "config": _read(config, f"{key}/config.json")}

    return {
        "title": config.pretrained,
        "pipeline": str(index.get("_class_name")),
        "denoiser": part(denoiser),
        "vae": part("vae"),
        "text_encoders": [part(key) for key in _TEXT_ENCODERS if key in classes],
    }


def _read(config: ModelConfig, file: str) -> dict[str, Any]:
    """Returns the content of a pipeline's configuration file. From the hub, only this file is downloaded."""
    from huggingface_hub import hf_hub_download

    source = locate(config)
    try:
        if isinstance(source, Path):
            path = source / file
        else:
            path = Path(hf_hub_download(source, file, revision=config.revision))
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.pretrained: cannot read {file} of {config.pretrained!r}: {first_line(error)}; --model takes "
            f"one of {', '.join(known())} instead"
        ) from error
    if not isinstance(found, dict):
        _refuse(config, f"{file} holds no mapping")
    return found


def _refuse(config: ModelConfig, reason: str) -> NoReturn:
    raise ConfigError(f"model.pretrained: {config.pretrained!r} cannot be planned: {reason}")
