"""Finds out what a model is and loads it as a policy."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.errors import ConfigError
from loopfast.policies.base import Policy
from loopfast.schedules import TransitionSchedule, transition_schedule

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

# Samplers of the same diffusion process: their training schedule defines the DDIM transition as well.
_DDIM_COMPATIBLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def load_policy(
    config: ModelConfig,
    *,
    seed: int = 0,
    keep_reference: bool = False,
    cast: bool = False,
    sharded: bool = False,
) -> Policy:
    """The policy a configuration names, ready to be trained.

    Args:
        config: the section ``model``.
        seed: of the adapter's initial weights.
        keep_reference: keep the model before training at hand where that costs memory (full fine-tuning).
        cast: give trained weights, too, the type to compute in, for an engine that keeps float32 ones itself.
        sharded: leave the denoiser in the host's memory, for an engine that takes a part of it.

    Raises:
        ConfigError: the model cannot be found or loaded, or its family is not supported.
    """
    from loopfast.policies.sd import StableDiffusionPolicy

    family = _index(config)["_class_name"]
    if family != "StableDiffusionPipeline":
        raise ConfigError(
            f"model.pretrained: {config.pretrained!r} is a {family}; supported: StableDiffusionPipeline"
        )
    return StableDiffusionPolicy(
        config,
        load_scheduler(config),
        seed=seed,
        keep_reference=keep_reference,
        cast=cast,
        sharded=sharded,
    )


def load_scheduler(config: ModelConfig) -> DDIMScheduler:
    """The DDIM scheduler of a model, without loading the model.

    A pipeline that comes with another sampler of the same diffusion process gets DDIM with that process's schedule,
    as DDPO and diffusers' documentation do.

    Raises:
        ConfigError: the model cannot be found, or its scheduler describes another process.
    """
    from diffusers import DDIMScheduler

    entry = _index(config).get("scheduler")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if name not in _DDIM_COMPATIBLE:
        raise ConfigError(
            f"model.pretrained: the scheduler of {config.pretrained!r} is {name}; supported: "
            f"{', '.join(_DDIM_COMPATIBLE)}"
        )
    options: dict[str, Any] = {"subfolder": "scheduler"}
    if config.revision:
        options["revision"] = config.revision
    try:
        settings, _ = DDIMScheduler.load_config(str(locate(config)), return_unused_kwargs=True, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.pretrained: cannot load the scheduler of {config.pretrained!r}: {first_line(error)}"
        ) from error
    # DDIM clips by default; samplers that have no such option never clipped
    if "clip_sample" not in settings:
        settings = {**settings, "clip_sample": False}
    return DDIMScheduler.from_config(settings)


def load_schedule(config: ModelConfig, rollout: RolloutConfig) -> TransitionSchedule:
    """The transition schedule of a model under the sampler settings of a configuration.

    Raises:
        ConfigError: the scheduler or a setting cannot be expressed as a transition table.
    """
    if rollout.noise_level is not None:
        raise ConfigError("rollout.noise_level belongs to flow-matching models; DDIM takes rollout.eta")
    eta = 1.0 if rollout.eta is None else rollout.eta
    try:
        return transition_schedule(load_scheduler(config), rollout.steps, eta=eta)
    except ValueError as error:
        raise ConfigError(f"the scheduler of {config.pretrained!r} cannot be used: {error}") from error


def trained_steps(schedule: TransitionSchedule, spec: str) -> tuple[int, ...]:
    """The transitions that ``train.steps`` selects.

    Raises:
        ConfigError: it selects none.
    """
    try:
        steps = schedule.trained_steps(spec)
    except ValueError as error:
        raise ConfigError(f"train.steps: {error}") from error
    if not steps:
        raise ConfigError(f"train.steps: {spec} selects no transition that can be trained on")
    return steps


def locate(config: ModelConfig) -> Path | str:
    """The folder of a local or embedded model, or the hub name itself."""
    if config.pretrained == "embedded":
        return Path(str(resources.files("loopfast.embedded") / "model"))
    path = Path(config.pretrained).expanduser()
    return path if path.is_dir() else config.pretrained


def torch_device(name: str, *, key: str = "model.device") -> torch.device:
    """The device that a configuration's ``key`` names.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{key}: {name} is not there; this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return device


def _index(config: ModelConfig) -> dict[str, Any]:
    """The pipeline's ``model_index.json``."""
    from diffusers import DiffusionPipeline

    try:
        source = locate(config)
        if isinstance(source, Path):
            index = json.loads((source / DiffusionPipeline.config_name).read_text("utf-8"))
        else:
            index = DiffusionPipeline.load_config(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.pretrained: cannot find a diffusers pipeline at {config.pretrained!r}: {first_line(error)}"
        ) from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ConfigError(
            f"model.pretrained: {config.pretrained!r} is no diffusers pipeline: no _class_name in model_index.json"
        )
    return index


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries append."""
    return str(error).strip().split("\n")[0]
