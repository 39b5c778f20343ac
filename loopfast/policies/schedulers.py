"""The scheduler whose transitions are sampled, the model's own or what ``model.scheduler`` names, and its schedule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.errors import ConfigError, as_config_error
from loopfast.policies.loading import class_of, component_config, load_family, model_index
from loopfast.policies.resolution import latent_size
from loopfast.schedules import (
    TransitionSchedule,
    refuse_unmapped,
    replaced_by_ddim,
    resolution_shift,
    transition_schedule,
)

# Samplers of one diffusion process: their training schedule defines DDIM's transition, too.
_DIFFUSION = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
_FLOW = ("FlowMatchEulerDiscreteScheduler",)
# Classes that clip by default.
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")
_FILE = "scheduler_config.json"


def load_scheduler(config: ModelConfig) -> Any:
    """Returns the scheduler whose transitions are sampled, without loading the model.

    A diffusion pipeline with another sampler of the same process gets DDIM with that process's schedule, as in DDPO and
    in diffusers' documentation.

    Returns:
        A ``DDIMScheduler``, or for a flow a ``FlowMatchEulerDiscreteScheduler``.

    Raises:
        ConfigError: the model cannot be found, its scheduler describes another process, or the scheduler's
            configuration is wrong.
    """
    return _choose(config)[0]


def scheduler_notes(config: ModelConfig) -> tuple[str, ...]:
    """Returns a line for each difference between the sampler of training and the model's own scheduler.

    Raises:
        ConfigError: as `load_scheduler` does.
    """
    return _choose(config)[1]


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
    with as_config_error(f"the scheduler of {config.pretrained!r} cannot be used", ValueError):
        if scheduler.config.get("use_dynamic_shifting"):
            denoiser, vae = (component_config(config, name) for name in (family.denoiser, "vae"))
            height, width = latent_size(config, family, denoiser, vae)
            tokens = height // family.patch * (width // family.patch)
            options["mu"] = resolution_shift(scheduler.config, tokens)
        return transition_schedule(scheduler, rollout.steps, **options)


def trained_steps(schedule: TransitionSchedule, spec: str) -> tuple[int, ...]:
    """Returns the transitions that ``train.steps`` selects.

    Raises:
        ConfigError: it selects none.
    """
    with as_config_error("train.steps", ValueError):
        return schedule.trained_steps(spec)


def _choose(config: ModelConfig) -> tuple[Any, tuple[str, ...]]:
    """Returns the scheduler whose transitions are sampled, and a line for each difference from its file."""
    import diffusers

    family = load_family(config)
    flow = family.process == "flow"
    usable = _FLOW if flow else _DIFFUSION
    kind, given, written_for, source = _given(config)
    if kind not in usable:
        raise ConfigError(
            f"{'' if config.scheduler else 'model.pretrained: '}{source} is {kind}; supported: "
            f"{', '.join(usable)}{'' if config.scheduler else '; model.scheduler chooses another'}"
        )
    options = {option: value for option, value in given.items() if not option.startswith("_")}
    notes = []
    for option, value in family.scheduler_options:
        if options.get(option) not in (None, value):
            notes.append(
                f"{source} says {option}={options[option]!r}; {family.pipelines[0]} takes {value} instead, and "
                "so does training"
            )
        options[option] = value
    if not flow:
        # other samplers never clip by default
        options.setdefault("clip_sample", written_for in _CLIPPING)
    try:
        refuse_unmapped(options, kind)
    except ValueError as error:
        advice = "" if config.scheduler else "; model.scheduler overrides options"
        raise ConfigError(f"{source} cannot be used: {error}{advice}") from error
    if replaced := replaced_by_ddim(options, kind):
        shown = ", ".join(f"{option}={value}" for option, value in replaced.items())
        notes.append(
            f"{source}, {kind}, samples with {shown}; training samples with DDIM, by the noise schedule of "
            "the same process"
        )
    sampler: Any = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler
    # diffusers warns about unknown options
    known = sampler().config
    options = {
        option: value for option, value in options.items() if option in known or value not in (None, False)
    }
    return sampler.from_config(options), tuple(notes)


def _given(config: ModelConfig) -> tuple[Any, dict[str, Any], Any, str]:
    """Returns a scheduler's class (None if the model names none), its options, and its name in messages.

    The third result, before the name, is the class whose defaults apply to options that are not given. Only the
    configuration of the model's own scheduler is read: its class may need packages that are not installed.
    """
    name = class_of(model_index(config).get("scheduler"))
    chosen, known = config.scheduler, (*_DIFFUSION, *_FLOW)
    if chosen is None:
        own = f"the scheduler of {config.pretrained!r}"
        return name, component_config(config, "scheduler") if name in known else {}, name, own
    if isinstance(chosen, dict):
        options = {**component_config(config, "scheduler"), **chosen}
        return chosen.get("_class_name", name), options, name, "model.scheduler"
    if chosen in known:
        return chosen, component_config(config, "scheduler"), name, "model.scheduler"
    file = _file(chosen)
    with as_config_error(f"model.scheduler: cannot read {file}", OSError, ValueError, RecursionError):
        found = json.loads(file.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ConfigError(f"model.scheduler: {file} holds no object")
    kind = found.get("_class_name", name)
    return kind, found, kind, f"model.scheduler: {file}"


def _file(given: str) -> Path:
    """Returns the scheduler's file in a scheduler's or a pipeline's folder, or the file itself."""
    path = Path(os.path.expanduser(given))  # noqa: PTH111 - Path's raises if there is no such user
    for file in (path / _FILE, path / "scheduler" / _FILE, path):
        if file.is_file():
            return file
    if path.exists():
        raise ConfigError(f"model.scheduler: there is no {_FILE} in {path}")
    raise ConfigError(
        f"model.scheduler: found {given!r}, allowed: a folder with {_FILE}, a mapping of options, or one of "
        f"{', '.join((*_DIFFUSION, *_FLOW))}"
    )
