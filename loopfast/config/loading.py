"""Reads and writes configurations, and lists the recipes of the package."""

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
    """Reads, overrides and validates a configuration.

    Args:
        source: the name of a recipe of the package, or the path of a YAML file.
        overrides: ``"section.key=value"`` each, with the value in YAML, applied in order. A number selects an item of a
            list: ``reward.0.weight=2``.
        changes: values of a Python program by section, applied in order before the overrides. Other keys of a section
            keep their values.

    Raises:
        ConfigError: the source cannot be read, or something in it is not allowed. The message lists every problem with
            its key, its line or override, and the allowed values.
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
    """Does the same as `load_config` for a text, which errors call ``name``."""
    document = Document.from_yaml(text, name, list(Config.model_fields))
    for change in changes:
        document.change(change, is_section)
    for override in overrides:
        document.override(override)
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        # A value that fits no branch of a union causes an error for each branch; they have the same explanation.
        details = error.errors(include_url=False)
        problems = list(dict.fromkeys(explain(detail, document) for detail in details))
    else:
        problems = list(conflicts(config))
        if not problems:
            return config
    lines = [f"{document.place(path)}: {message}" for path, message in problems]
    raise ConfigError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines]))


def config_to_yaml(config: Config, *, defaults: bool = True) -> str:
    """Returns a configuration as YAML, from which `load_config` reads an equal one.

    Args:
        config: the configuration.
        defaults: also write the keys with their default values.
    """
    values = config.model_dump(exclude_defaults=not defaults)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema (2020-12) of a configuration file, with a description of every key."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def recipes() -> list[str]:
    """Returns the names of the configurations in the package."""
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
