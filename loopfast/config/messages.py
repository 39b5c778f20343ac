"""Messages about wrong values: the value that was found, and the allowed ones."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from loopfast.config.document import Document, KeyPath, dotted, found
from loopfast.config.sections import Config


def problem(path: KeyPath, value: object, allowed: str) -> tuple[KeyPath, str]:
    """Returns the key of a message, and the message."""
    return path, f"{dotted(path)}: found {found(value)}, allowed: {allowed}"


def explain(error: ErrorDetails, document: Document) -> tuple[KeyPath, str]:
    """Returns the key of a pydantic error, and a message about it."""
    if error["type"] == "extra_forbidden":
        path = error["loc"]
        return path, f"unknown key {dotted(path)!r}; nearest known key: {_nearest(path)!r}"
    path, schema = schema_at(error["loc"])
    if error["type"] == "missing":
        while schema.get("required"):
            path, schema = schema_at((*path, schema["required"][0]))
        return path, f"{dotted(path)} is missing: {schema.get('description') or allowed_values(schema)}"
    return problem(path, document.value(path), allowed_values(schema))


def differences(before: Any, now: Any, ignored: Collection[str] = ()) -> list[str]:
    """Returns the dotted keys whose values differ between two nested dictionaries, each with both values."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key} (was {old.get(key)}, is {new.get(key)})"
        for key in sorted((old.keys() | new.keys()).difference(ignored))
        if old.get(key) != new.get(key)
    ]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, part in value.items():
        yield from _leaves(part, f"{key}.{name}" if key else name)


@cache
def _root_schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return _root_schema()["$defs"][reference.rpartition("/")[2]] if reference else schema


def schema_at(location: Sequence[str | int]) -> tuple[KeyPath, dict[str, Any]]:
    """Follows ``location`` into the schema, up to a part that is not a key but a branch of a union."""
    schema = _root_schema()
    path: KeyPath = ()
    for part in location:
        inner = schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
        if inner is None:
            break
        schema = _resolved(inner)
        path = (*path, part)
    return path, schema


def is_section(path: KeyPath) -> bool:
    """Returns whether a key contains other keys."""
    known, schema = schema_at(path)
    return known == path and "properties" in schema


def _known_paths(schema: dict[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    for key, inner in schema.get("properties", {}).items():
        yield (*path, key)
        yield from _known_paths(_resolved(inner), (*path, key))
    if "items" in schema:
        yield from _known_paths(_resolved(schema["items"]), (*path, 0))


def _nearest(path: Sequence[str | int]) -> str:
    """Returns the known key most similar to the unknown one at ``path``, preferably in the same section."""
    section = tuple(0 if isinstance(part, int) else part for part in path[:-1])
    written = str(path[-1])[:64].lower().replace("-", "_")

    def similarity(known: Sequence[str | int]) -> float:
        name = str(known[-1])
        initials = "".join(word[0] for word in name.split("_"))
        similarity = 0.9 if written == initials else difflib.SequenceMatcher(None, written, name).ratio()
        return similarity + (0.2 if tuple(known[:-1]) == section else 0.0)

    return dotted(max(_known_paths(_root_schema()), key=similarity))


def allowed_values(schema: dict[str, Any]) -> str:
    """Describes the values that a JSON schema allows."""
    schema = _resolved(schema)
    if "anyOf" in schema:
        return " or ".join(sorted((allowed_values(branch) for branch in schema["anyOf"]), key="null".__ne__))
    if "const" in schema or "enum" in schema:
        return " or ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if "patternErrorMessage" in schema:
        return str(schema["patternErrorMessage"])
    kind = schema.get("type")
    if kind == "object":
        keys = ", ".join(schema.get("properties", ()))
        return f"a mapping with the keys {keys}" if keys else "a mapping"
    if kind == "array":
        at_least = " with at least one item" if schema.get("minItems") else ""
        return f"a list{at_least}, each {allowed_values(schema['items'])}"
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {schema[bound]:.16g}" for bound, sign in bounds.items() if bound in schema)
    return f"{words.get(str(kind), str(kind))} {limits}".rstrip()
