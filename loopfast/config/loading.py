"""Reads configurations, writes them, and names those that come with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from loopfast.config.document import Document, Dumper
from loopfast.config.messages import explain, is_section
from loopfast.config.rules import conflicts
from loopfast.config.sections import Config
from loopfast.errors import ConfigError
from loopfast.system.files import read_settings

_RECIPES = resources.files("loopfast") / "recipes"


def load_config(
    source: str | Path, overrides: Sequence[str] = (), changes: Sequence[Mapping[str, Any]] = ()
) -> Config:
    """Read, override and validate a configuration.

    Args:
        source: name of a recipe of the package, or path of a YAML file.
        overrides: ``"section.key=value"`` each, the value in YAML; applied in order. Items of a list are
            reached by their number: ``reward.0.weight=2``.
        changes: values of a Python program, by section; applied in order, before the overrides. A section's keys that
            are not named stay as they are.

    Raises:
        ConfigError: the source cannot be found or read, or something in it is not allowed. The message lists
            every problem with its key, its line or override, and what is allowed.
    """
    name, text = _read(source)
    return parse_config(text, overrides, changes, name=name)


def parse_config(
    text: str,
    overrides: Sequence[str] = (),
    changes: Sequence[Mapping[str, Any]] = (),
    *,
    name: str = "configuration",
) -> Config:
    """As `load_config`, from text; ``name`` is what errors call it."""
    document = Document.from_yaml(text, name, list(Config.model_fields))
    for change in changes:
        document.change(change, is_section)
    for override in overrides:
        document.override(override)
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        # A value that fits no branch of a union has one error for each branch, all explained alike.
        details = error.errors(include_url=False)
        problems = list(dict.fromkeys(explain(detail, document) for detail in details))
    else:
        problems = list(conflicts(config))
        if not problems:
            return config
    lines = [f"{document.place(path)}: {message}" for path, message in problems]
    raise ConfigError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines]))


def config_to_yaml(config: Config, *, defaults: bool = True) -> str:
    """A configuration as YAML that `load_config` reads back to an equal one.

    Args:
        config: the configuration.
        defaults: write keys that have their default value, too.
    """
    values = config.model_dump(exclude_defaults=not defaults)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the YAML file, with a description for every key."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def recipes() -> list[str]:
    """Names of the configurations that come with the package."""
    names = (entry.name for entry in _RECIPES.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and source in recipes():
        return f"recipe {source}", (_RECIPES / f"{source}.yaml").read_text("utf-8")
    try:
        return str(source), read_settings(Path(source), "utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration {str(source)!r}: neither a file nor a recipe ({', '.join(recipes())})"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read configuration {str(source)!r}: {error}") from None
