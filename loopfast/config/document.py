"""A YAML 1.2 document that knows the place of each value, and can be overridden."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml

from loopfast.errors import ConfigError, first_line, one_line, short

KeyPath = tuple[str | int, ...]
"""A key, after the keys and list indices that contain it."""

# Deeper than every key, and not so deep that a document can exhaust the stack.
_MAX_DEPTH = 16

# The core schema of YAML 1.2: the form of each type of scalar, and its conversion. PyYAML implements YAML 1.1, where
# ``off`` is false, ``1:30`` is ninety and ``1e-4`` is text.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema of YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: D102
        return True


_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
for _kind, (_pattern, _) in _SCALARS.items():
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), None)


@dataclass
class Document:
    """Plain data read from YAML, with the place of each part in its file or override."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    @classmethod
    def from_yaml(cls, text: str, name: str, keys: Sequence[str]) -> Document:
        """Reads a file's text. ``keys`` are the allowed ones, for the error about a file that is not a mapping."""
        document = cls(name)
        data = document._parse(text, lambda line: f"{name}, line {line}", ())
        if data is not None and not isinstance(data, dict):
            raise ConfigError(
                f"{name}: found {found(data)}, allowed: a mapping with the keys {', '.join(keys)}"
            )
        document.data = data or {}
        return document

    def override(self, assignment: str) -> None:
        """Applies one ``section.key=value``."""
        place = f"--set {one_line(assignment)}"
        key, equals, value = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) > _MAX_DEPTH:
            raise ConfigError(f"{place}: allowed: --set section.key=value")
        target: Any = self.data
        path: KeyPath = ()
        for part in parts:
            if isinstance(target, list):
                if not part.isascii() or not part.isdigit() or len(part) > 9 or int(part) >= len(target):
                    raise ConfigError(
                        f"{place}: {dotted(path)} has {len(target)} item(s), numbered from 0; found {part!r}"
                    )
            elif not isinstance(target, dict):
                raise ConfigError(f"{place}: {dotted(path)} is {found(target)} and has no keys")
            path = (*path, int(part) if isinstance(target, list) else part)
            if len(path) < len(parts):
                if isinstance(target, dict) and target.get(part) is None:
                    target[part] = {}
                    self.places[path] = place
                target = target[path[-1]]
        self._forget(path)
        parsed = self._parse(value, lambda line: place, path)
        # "5:" and "a: b" are text in an override; a mapping is written in braces.
        is_text = isinstance(parsed, dict) and not value.lstrip().startswith("{")
        target[path[-1]] = value.strip() if is_text else parsed
        self.places[path] = place

    def change(
        self, changes: Mapping[str, Any], is_section: Callable[[KeyPath], bool], path: KeyPath = ()
    ) -> None:
        """Sets values of a Python program in the section at ``path``. Other keys keep their values."""
        target = self.value(path)
        for key, value in changes.items():
            here = (*path, key)
            if isinstance(value, Mapping) and is_section(here):
                if not isinstance(target.get(key), dict):
                    target[key] = {}
                self.change(value, is_section, here)
                continue
            self._forget(here)
            target[key] = _plain(value)
            self.places[here] = f"argument {here[0]}"

    def _forget(self, path: KeyPath) -> None:
        """Removes the places of the value at ``path`` and of everything in it."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]

    def value(self, path: KeyPath) -> Any:
        """Returns the value at ``path``."""
        value: Any = self.data
        for part in path:
            value = value[part]
        return value

    def place(self, path: KeyPath) -> str:
        """Returns the place of the value at ``path``, or of the nearest section or list that contains it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def _parse(self, text: str, place: Callable[[int], str], path: KeyPath) -> Any:
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = place(mark.line + 1) if mark else self.name
            raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
        except RecursionError:
            raise ConfigError(f"{place(1)}: nested too deeply") from None
        # PyYAML passes a malformed escape or version number to int() and chr(), which raise the last two.
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise ConfigError(f"{place(1)}: not valid YAML: {first_line(error)}") from None
        seen: set[int] = set()

        def plain(node: yaml.Node, path: KeyPath) -> Any:
            where = place(node.start_mark.line + 1)
            if path:
                self.places[path] = where
            if id(node) in seen:
                raise ConfigError(f"{where}: anchors and aliases are not supported; write the value out")
            seen.add(id(node))
            if len(path) > _MAX_DEPTH:
                raise ConfigError(f"{where}: nested too deeply")
            kind = node.tag.removeprefix(_TAG)
            if isinstance(node, yaml.MappingNode) and kind == "map":
                mapping: dict[str, Any] = {}
                for key_node, value_node in node.value:
                    where = place(key_node.start_mark.line + 1)
                    if not isinstance(key_node, yaml.ScalarNode):
                        raise ConfigError(f"{where}: a key must be text")
                    if key_node.value in mapping:
                        raise ConfigError(f"{where}: key {key_node.value!r} is given twice")
                    mapping[key_node.value] = plain(value_node, (*path, key_node.value))
                    self.places[(*path, key_node.value)] = where
                return mapping
            if isinstance(node, yaml.SequenceNode) and kind == "seq":
                return [plain(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode) and kind == "str":
                return node.value
            if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
                try:
                    return _SCALARS[kind][1](node.value)
                except ValueError:
                    raise ConfigError(f"{where}: {short(node.value)!r} is not of type {kind}") from None
            raise ConfigError(f"{where}: YAML tag {node.tag!r} is not supported")

        return None if root is None else plain(root, path)


def dotted(path: Sequence[str | int]) -> str:
    """Returns a key in the form of messages and overrides."""
    return ".".join(str(part) for part in path)


def found(value: object) -> str:
    """Returns a value in the form that its author would recognize."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return repr(short(value))
    try:
        return short(yaml.dump(value, Dumper=Dumper).splitlines()[0])
    except yaml.YAMLError:  # an object of a Python program
        return f"an object of type {type(value).__name__}"


def _plain(value: object) -> object:
    """Returns a value of a Python program in the types of a YAML document."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value
