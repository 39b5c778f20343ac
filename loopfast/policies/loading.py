"""Recognizes a model's family and loads it as a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, as_config_error, first_line
from loopfast.policies.base import Policy
from loopfast.policies.families import Family, family_of, supported
from loopfast.policies.source import check_weights, find_source, locate, not_on_the_hub

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names that pipelines give their text encoders."""


def load_policy(
    config: ModelConfig,
    *,
    seed: int = 0,
    keep_reference: bool = False,
    cast: bool = False,
    sharded: bool = False,
    start: bool = True,
) -> Policy:
    """Loads the policy that a configuration names, ready to be trained.

    Args:
        config: the section ``model``.
        seed: the seed of the adapter's initial weights.
        keep_reference: keep the model before training; with full fine-tuning this is a second network.
        cast: give the trained weights the type to compute in, for an engine that keeps float32 ones itself.
        sharded: leave the denoiser in the host's memory, for an engine that shards it.
        start: read ``model.lora.from``; False if a checkpoint's weights follow.

    Raises:
        ConfigError: the model cannot be found or loaded, or its family is not supported.
    """
    if not start:
        config = config.model_copy(update={"lora": config.lora.model_copy(update={"from_": None})})
    family = load_family(config)
    return family.policy_class()(
        config, family, seed=seed, keep_reference=keep_reference, cast=cast, sharded=sharded
    )


def load_family(config: ModelConfig) -> Family:
    """Returns the family of a model, without loading the model.

    Raises:
        ConfigError: the model cannot be found, or no such family is supported.
    """
    index = model_index(config)
    name = index["_class_name"]
    family = family_of(name)
    if family is None:
        raise ConfigError(f"model.pretrained: {config.pretrained!r} is a {name}; supported: {supported()}")
    check_weights(config, [part for part in (family.denoiser, "vae", *TEXT_ENCODERS) if part in index])
    return family


def class_of(entry: Any) -> Any:
    """Returns the class of a component in ``model_index.json``; None if the entry names none."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def component_config(config: ModelConfig, component: str) -> dict[str, Any]:
    """Reads the configuration of a component in ``model_index.json``, which must be of a diffusers class."""
    import diffusers

    entry = model_index(config).get(component)
    # any scheduler's class reads the file; the model's own may need packages that are not installed
    name = "DDIMScheduler" if component == "scheduler" else class_of(entry)
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise ConfigError(
            f"model.pretrained: model_index.json of {config.pretrained!r} says {entry!r} of its {component}, which is "
            "no class of diffusers"
        )
    failed = f"model.pretrained: cannot load the {component} of {config.pretrained!r}"
    with as_config_error(failed, OSError, ValueError):
        settings = kind.load_config(str(locate(config)), subfolder=component, revision=config.revision)
    if not isinstance(settings, dict):
        raise ConfigError(
            f"model.pretrained: the configuration of {config.pretrained!r}'s {component} is no object"
        )
    return dict(settings)


def model_index(config: ModelConfig) -> dict[str, Any]:
    """Reads the pipeline's ``model_index.json``."""
    source = find_source(config)
    place = source.pipeline
    try:
        if isinstance(place, Path):
            index = json.loads((place / "model_index.json").read_text("utf-8"))
        else:
            from diffusers import DiffusionPipeline

            index = DiffusionPipeline.load_config(place, revision=config.revision)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        if isinstance(place, str):
            reason += (
                not_on_the_hub(place)
                if source.file is None
                else (
                    "; it describes the single file that model.pretrained names; a folder with such a pipeline's "
                    "configuration files can be given as model.config"
                )
            )
        raise ConfigError(f"model.pretrained: no diffusers pipeline at {str(place)!r}: {reason}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ConfigError(
            f"model.pretrained: {str(place)!r} is no diffusers pipeline: no _class_name in model_index.json"
        )
    return index
