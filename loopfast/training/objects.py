"""The objects that a Python program passes in place of a configuration's names: functions, prompts, a pipeline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopfast.config import Config, config_to_yaml, load_config, parse_config
from loopfast.config.rules import RESERVED_NAMES
from loopfast.errors import ConfigError, first_line
from loopfast.prompts import Prompt, as_prompts
from loopfast.run.folder import RunFolder
from loopfast.system.files import write_file, writing
from loopfast.system.plugins import reference_to

PIPELINE = "base"
"""Name of the folder of a pipeline object in the run's folder."""

_FILES = {"prompts": ("source", "prompts.jsonl"), "evaluation": ("prompts", "evaluation-prompts.jsonl")}
"""By section, the key that may have a list of prompts, and the file in the run's folder that keeps it."""


@dataclass(frozen=True)
class ProgramObjects:
    """Objects of a Python program. Prompts and pipelines are written into the run's folder, and named by their paths.

    Attributes:
        rewards: functions that no module has under a name, by the names that the configuration has for them.
        prompts: lists of prompts, by the names of their files.
        pipeline: a diffusers pipeline; None if ``model.pretrained`` names one.
    """

    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    pipeline: Any = None

    def check(self, config: Config) -> None:
        """Checks that a run of the configuration can use the objects.

        Raises:
            ConfigError: rewards are scored in another process, which cannot import a function without a name.
        """
        if self.rewards and config.rollout.reward_worker == "process":
            raise ConfigError(
                f"rollout.reward_worker: found process, allowed: auto, none, inline or thread with reward "
                f"{min(self.rewards)}, an object that another process cannot import"
            )

    def notes(self) -> list[str]:
        """Returns a warning for each object that the command line cannot resume with."""
        return [
            f"reward {name} is an object that a checkpoint cannot name: to resume this run, call loopfast.train with "
            "it again"
            for name in self.rewards
        ]

    def write(self, folder: RunFolder, resume: str | None) -> None:
        """Writes prompts and pipeline into a run's folder. A run that is resumed keeps its pipeline.

        Args:
            folder: folder of the run.
            resume: as for `RunFolder.open`.

        Raises:
            ConfigError: the folder has a run that cannot be continued, or the pipeline cannot be saved.
            CheckpointError: the run to resume does not exist.
            WriteError: the folder cannot be written.
        """
        if not self.prompts and self.pipeline is None:
            return
        continues = folder.continues(resume)
        for name, prompts in self.prompts.items():
            with writing(folder.path):
                write_file(folder.path / name, _as_lines(prompts).encode())
        target = folder.path / PIPELINE
        if self.pipeline is None or (continues and target.exists()):
            return
        temporary = target.with_name(f".tmp-{PIPELINE}")
        with writing(folder.path):
            for former in (temporary, target):
                shutil.rmtree(former, ignore_errors=True)
            _save(self.pipeline, str(temporary))
            temporary.rename(target)


def configured(
    config: str | Path | Config | Mapping[str, Any],
    sections: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> tuple[Config, ProgramObjects]:
    """Makes a configuration in which names stand for a program's objects, and collects these objects.

    Args:
        config: name of a recipe, path of a YAML file, or the contents of such a file.
        sections: values by section, in which functions, lists of prompts and a pipeline may stand for names.
        overrides: as for `load_config`.

    Raises:
        ConfigError: a value cannot be used.
    """
    changes, lists = dict(sections), dict[str, list[Prompt]]()
    rewards: dict[str, Callable[..., Any]] = {}
    if "reward" in changes:
        changes["reward"] = _named_rewards(changes["reward"], rewards)
    for section, (key, file) in _FILES.items():
        found = changes.get(section)
        if isinstance(found, Mapping) and _is_list(found.get(key)):
            lists[file] = storable_prompts(f"{section}.{key}", found[key])
            changes[section] = {**found, key: file}
    model, pipeline = changes.get("model"), None
    if isinstance(model, Mapping) and hasattr(model.get("pretrained"), "save_pretrained"):
        pipeline = model["pretrained"]
        changes["model"] = {**model, "pretrained": PIPELINE}
    settings = _loaded(config, overrides, changes)
    folder = RunFolder(settings).path
    # their paths follow from the run's name
    for section, (key, file) in _FILES.items():
        if file in lists:
            settings = _with(settings, section, key, str(folder / file))
    if pipeline is not None:
        settings = _with(settings, "model", "pretrained", str(folder / PIPELINE))
    return settings, ProgramObjects(rewards, lists, pipeline)


def _loaded(
    config: str | Path | Config | Mapping[str, Any], overrides: Sequence[str], changes: Mapping[str, Any]
) -> Config:
    if isinstance(config, Config):
        return parse_config(config_to_yaml(config), overrides, [changes]) if overrides or changes else config
    if isinstance(config, str | Path):
        return load_config(config, overrides, [changes])
    if isinstance(config, Mapping):
        return parse_config("", overrides, [config, changes], name="the mapping")
    raise ConfigError(
        f"config: found {type(config).__name__}, allowed: a recipe's name, a file, a mapping or a Config"
    )


def _with(config: Config, section: str, key: str, value: object) -> Config:
    changed = getattr(config, section).model_copy(update={key: value})
    return config.model_copy(update={section: changed})


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not (isinstance(value, str | Path | Mapping) or callable(value))


def _named_rewards(rewards: object, functions: dict[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """Gives each term of the reward a name; functions without a name get a new one, and are added to ``functions``."""
    terms, labels = [], set[str]()
    for item in rewards if _is_list(rewards) else [rewards]:  # type: ignore[attr-defined]
        term = dict(item) if isinstance(item, Mapping) else {"name": item}
        function = term.get("name")
        if callable(function):
            reference = reference_to(function)
            if reference is not None:
                term["name"] = reference
            else:
                label = term.get("label") or _label(function, labels)
                term |= {"name": f"<{label}>", "label": label}
                functions[term["name"]] = function
                labels.add(label)
        terms.append(term)
    return terms


def _label(function: object, labels: set[str]) -> str:
    """Returns the name of a function in metrics: its own, or with a number if that is taken."""
    name = str(getattr(function, "__name__", type(function).__name__))
    name = re.sub(r"[^A-Za-z0-9._-]", "", name).lstrip("._-")[:100] or "function"
    number, label = 1, name
    while label in labels or label in RESERVED_NAMES:
        number += 1
        label = f"{name}-{number}"
    return label


def _save(pipeline: Any, folder: str) -> None:
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
    except (AttributeError, TypeError, ValueError) as error:
        kind = type(pipeline).__name__
        raise ConfigError(f"model.pretrained: the {kind} cannot be saved: {first_line(error)}") from error


def storable_prompts(key: str, items: Iterable[object]) -> list[Prompt]:
    """Makes prompts that a file can hold from texts or `Prompt` objects.

    Raises:
        ConfigError: an item is neither, or JSON cannot hold its metadata; the message names ``key``.
    """
    prompts = as_prompts(key, items)
    if not prompts:
        raise ConfigError(f"{key}: there is no prompt in it")
    for index, prompt in enumerate(prompts):
        strange = [name for name in prompt.metadata if not isinstance(name, str) or name.lower() == "prompt"]
        if strange:
            raise ConfigError(
                f"{key}: the metadata of item {index} has the key {strange[0]!r}; allowed: other texts"
            )
        try:
            json.dumps(dict(prompt.metadata))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}: the metadata of item {index} cannot be written: {error}") from None
    return prompts


def _as_lines(prompts: Sequence[Prompt]) -> str:
    """Returns the contents of a file of prompts, with an object a line."""
    return "".join(json.dumps({**prompt.metadata, "prompt": prompt.text}) + "\n" for prompt in prompts)
