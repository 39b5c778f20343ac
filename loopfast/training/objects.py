"""Turns what a Python program gives a run into a configuration, and the objects that it has names for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopfast.config import Config, config_to_yaml, load_config, parse_config
from loopfast.config.rules import RESERVED_NAMES
from loopfast.errors import ConfigError
from loopfast.prompts import Prompt
from loopfast.run.folder import RunFolder
from loopfast.system.plugins import reference_to
from loopfast.training.given import PIPELINE, Given, storable_prompts

_FILES = {"prompts": ("source", "prompts.jsonl"), "evaluation": ("prompts", "evaluation-prompts.jsonl")}
"""By section, the key that may have a list of prompts, and the name of the file that it is kept in."""


def configured(
    config: str | Path | Config | Mapping[str, Any],
    sections: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> tuple[Config, Given]:
    """A configuration, and the objects that it has names for.

    Args:
        config: name of a recipe, path of a YAML file, or what such a file holds.
        sections: values by section, in which functions, lists of prompts and a pipeline may stand for names.
        overrides: as for `load_config`.

    Raises:
        ConfigError: something cannot be used.
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
    # where they are is known once the run's name is
    for section, (key, file) in _FILES.items():
        if file in lists:
            settings = _with(settings, section, key, str(folder / file))
    if pipeline is not None:
        settings = _with(settings, "model", "pretrained", str(folder / PIPELINE))
    return settings, Given(rewards, lists, pipeline)


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


def _named_rewards(given: object, functions: dict[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """Terms of the reward with a name each; functions that have none are added to ``functions`` under the new one."""
    terms, labels = [], set[str]()
    for item in given if _is_list(given) else [given]:  # type: ignore[attr-defined]
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
    """What metrics call a function: its own name, or one like it where that is taken."""
    name = str(getattr(function, "__name__", type(function).__name__))
    name = re.sub(r"[^A-Za-z0-9._-]", "", name).lstrip("._-")[:100] or "function"
    number, label = 1, name
    while label in labels or label in RESERVED_NAMES:
        number += 1
        label = f"{name}-{number}"
    return label
