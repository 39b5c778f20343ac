"""The scheduler whose transitions are sampled: the model's own, or what ``model.scheduler`` names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Choice(NamedTuple):
    """A scheduler, and a line for each difference from its file."""

    scheduler: Any
    notes: tuple[str, ...]


class _Given(NamedTuple):
    """A scheduler's configuration.

    Attributes:
        name: the scheduler's class; None if the model names none.
        settings: the content of its file.
        written_for: the class whose defaults apply to options that the file lacks.
        source: the scheduler's name in messages.
    """

    name: Any
    settings: dict[str, Any]
    written_for: Any
    source: str


def choose_scheduler(
    config: ModelConfig, family: Family, name: str | None, settings: Callable[[], dict[str, Any]]
) -> Choice:
    """Returns the scheduler whose transitions are sampled; see `loopfast.policies.load_scheduler`.

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
    given = _given(config, name, settings)
    if given.name not in usable:
        raise ConfigError(
            f"{'' if config.scheduler else 'model.pretrained: '}{given.source} is {given.name}; supported: "
            f"{', '.join(usable)}{'' if config.scheduler else '; model.scheduler chooses another'}"
        )
    options = {option: value for option, value in given.settings.items() if not option.startswith("_")}
    notes = []
    for option, value in family.scheduler_options:
        if options.get(option) not in (None, value):
            notes.append(
                f"{given.source} says {option}={options[option]!r}; {family.pipelines[0]} takes {value} instead, and "
                "so does training"
            )
        options[option] = value
    if not flow:
        # other samplers never clip by default
        options.setdefault("clip_sample", given.written_for in _CLIPPING)
    try:
        refuse_unmapped(options, given.name)
    except ValueError as error:
        advice = "" if config.scheduler else "; model.scheduler overrides options"
        raise ConfigError(f"{given.source} cannot be used: {error}{advice}") from error
    if replaced := replaced_by_ddim(options, given.name):
        shown = ", ".join(f"{option}={value}" for option, value in replaced.items())
        notes.append(
            f"{given.source}, {given.name}, samples with {shown}; training samples with DDIM, by the noise schedule of "
            "the same process"
        )
    kind: Any = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler
    # diffusers warns about unknown options
    known = kind().config
    options = {
        option: value for option, value in options.items() if option in known or value not in (None, False)
    }
    return Choice(kind.from_config(options), tuple(notes))


def _given(config: ModelConfig, name: str | None, settings: Callable[[], dict[str, Any]]) -> _Given:
    chosen = config.scheduler
    own = f"the scheduler of {config.pretrained!r}"
    if chosen is None:
        return _Given(name, settings() if name in (*_DIFFUSION, *_FLOW) else {}, name, own)
    if isinstance(chosen, dict):
        written_for = chosen.get("_class_name", name)
        return _Given(written_for, {**settings(), **chosen}, name, "model.scheduler")
    if chosen in (*_DIFFUSION, *_FLOW):
        return _Given(chosen, settings(), name, "model.scheduler")
    file = _file(chosen)
    found = _read(file)
    written_for = found.get("_class_name", name)
    return _Given(written_for, found, written_for, f"model.scheduler: {file}")


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
