"""Recognizes a model's family and loads it as a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.errors import ConfigError, first_line
from loopfast.policies.base import Policy
from loopfast.policies.families import Family, family_of, supported
from loopfast.policies.resolution import latent_size
from loopfast.policies.schedulers import choose_scheduler
from loopfast.policies.source import check_weights, find_source, locate, not_on_the_hub
from loopfast.schedules import TransitionSchedule, resolution_shift, transition_schedule

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
        config,
        family,
        load_scheduler(config),
        seed=seed,
        keep_reference=keep_reference,
        cast=cast,
        sharded=sharded,
    )


def load_family(config: ModelConfig) -> Family:
    """Returns the family of a model, without loading the model.

    Raises:
        ConfigError: the model cannot be found, or no such family is supported.
    """
    index = _index(config)
    name = index["_class_name"]
    family = family_of(name)
    if family is None:
        raise ConfigError(f"model.pretrained: {config.pretrained!r} is a {name}; supported: {supported()}")
    check_weights(config, [part for part in (family.denoiser, "vae", *TEXT_ENCODERS) if part in index])
    return family


def load_scheduler(config: ModelConfig) -> Any:
    """Returns the scheduler whose transitions are sampled, without loading the model.

    A diffusion pipeline with another sampler of the same process gets DDIM with that process's schedule, as in DDPO and
    in diffusers' documentation.

    Returns:
        A ``DDIMScheduler``, or for a flow a ``FlowMatchEulerDiscreteScheduler``.

    Raises:
        ConfigError: the model cannot be found, or its scheduler describes another process.
    """
    return _choice(config)[0]


def scheduler_notes(config: ModelConfig) -> tuple[str, ...]:
    """Returns a line for each difference between the sampler of training and the model's own scheduler.

    Raises:
        ConfigError: as `load_scheduler` does.
    """
    return _choice(config)[1]


def _choice(config: ModelConfig) -> tuple[Any, tuple[str, ...]]:
    entry = _index(config).get("scheduler")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return choose_scheduler(config, load_family(config), name, lambda: component_config(config, "scheduler"))


def absent_components(config: ModelConfig) -> list[str]:
    """Returns the components that ``model_index.json`` lists as absent."""
    return [name for name, entry in _index(config).items() if entry == [None, None]]


def component_config(config: ModelConfig, component: str) -> dict[str, Any]:
    """Reads the configuration of a component in ``model_index.json``, which must be of a diffusers class.

    Raises:
        ConfigError: the configuration cannot be found or read.
    """
    import diffusers

    entry = _index(config).get(component)
    kind = getattr(diffusers, str(entry[1]), None) if isinstance(entry, list) and len(entry) == 2 else None
    if component == "scheduler":
        # any scheduler's class reads the file; the model's own may need packages that are not installed
        kind = diffusers.DDIMScheduler
    if kind is None:
        raise ConfigError(
            f"model.pretrained: model_index.json of {config.pretrained!r} says {entry!r} of its {component}, which is "
            "no class of diffusers"
        )
    try:
        settings = kind.load_config(str(locate(config)), subfolder=component, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.pretrained: cannot load the {component} of {config.pretrained!r}: {first_line(error)}"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"model.pretrained: the configuration of {config.pretrained!r}'s {component} is no object"
        )
    return dict(settings)


def load_schedule(config: ModelConfig, rollout: RolloutConfig) -> TransitionSchedule:
    """Returns the transition schedule of a model with the sampler's settings of a configuration.

    Raises:
        ConfigError: the scheduler or a setting cannot be expressed as a transition table.
    """
    family = load_family(config)
    flow = family.process == "flow"
    if flow and rollout.eta is not None:
        raise ConfigError("rollout.eta belongs to DDIM; flow-matching models take rollout.noise_level")
    if not flow and rollout.noise_level is not None:
        raise ConfigError("rollout.noise_level belongs to flow-matching models; DDIM takes rollout.eta")
    scheduler = load_scheduler(config)
    options: dict[str, Any] = {"eta": rollout.eta, "noise_level": rollout.noise_level}
    if "FluxPipeline" in family.pipelines and not scheduler.config.get("use_flow_sigmas"):
        # FLUX's pipeline gives its scheduler the noise levels before the shift
        options["sigmas"] = [1.0 - step / rollout.steps for step in range(rollout.steps)]
    try:
        if scheduler.config.get("use_dynamic_shifting"):
            denoiser, vae = (component_config(config, name) for name in (family.denoiser, "vae"))
            height, width = latent_size(config, family, denoiser, vae)
            tokens = height // family.patch * (width // family.patch)
            options["mu"] = resolution_shift(scheduler.config, tokens)
        return transition_schedule(scheduler, rollout.steps, **options)
    except ValueError as error:
        raise ConfigError(f"the scheduler of {config.pretrained!r} cannot be used: {error}") from error


def trained_steps(schedule: TransitionSchedule, spec: str) -> tuple[int, ...]:
    """Returns the transitions that ``train.steps`` selects.

    Raises:
        ConfigError: it selects none.
    """
    try:
        return schedule.trained_steps(spec)
    except ValueError as error:
        raise ConfigError(f"train.steps: {error}") from error


def _index(config: ModelConfig) -> dict[str, Any]:
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
