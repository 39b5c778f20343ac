"""The scheduler whose transitions are sampled: the model's own, or what ``model.scheduler`` names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies.families import Family
from loopfast.schedules import refuse_unmapped, replaced_by_ddim

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


def choose_scheduler(
    config: ModelConfig, family: Family, name: str | None, settings: Callable[[], dict[str, Any]]
) -> tuple[Any, tuple[str, ...]]:
    """Returns the scheduler whose transitions are sampled, and a line for each difference from its file.

    Only the configuration of the model's own scheduler is read: its class may need packages that are not installed.

    Args:
        config: the section ``model``.
        family: the model's family.
        name: the class of the model's own scheduler.
        settings: reads the configuration of the model's own scheduler.

    Raises:
        ConfigError: the scheduler describes another process, or its configuration is wrong.
    """
    import diffusers

    flow = family.process == "flow"
    usable = _FLOW if flow else _DIFFUSION
    kind, given, written_for, source = _given(config, name, settings)
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


def _given(
    config: ModelConfig, name: str | None, settings: Callable[[], dict[str, Any]]
) -> tuple[Any, dict[str, Any], Any, str]:
    """Returns a scheduler's class (None if the model names none), its options, and its name in messages.

    The third result, before the name, is the class whose defaults apply to options that are not given.
    """
    chosen, known = config.scheduler, (*_DIFFUSION, *_FLOW)
    if chosen is None:
        own = f"the scheduler of {config.pretrained!r}"
        return name, settings() if name in known else {}, name, own
    if isinstance(chosen, dict):
        return chosen.get("_class_name", name), {**settings(), **chosen}, name, "model.scheduler"
    if chosen in known:
        return chosen, settings(), name, "model.scheduler"
    file = _file(chosen)
    found = _read(file)
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


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.scheduler: cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"model.scheduler: {file} holds no object")
    return found
