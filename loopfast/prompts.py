"""Where prompts come from: the embedded world, T2I-CompBench, a text file, or the user's own function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopfast.embedded import world
from loopfast.errors import ConfigError
from loopfast.plugins import import_function, is_reference
from loopfast.t2i_compbench import CATEGORIES, read_category

__all__ = ["Prompt", "load_prompts"]

_ALLOWED = "embedded:<category>, t2i-compbench:<folder>:<category>, a text file with a prompt a line, module:function"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a reward may need to know beside its text.

    ``metadata["category"]``, where there is one, groups prompts in evaluations and reports.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def load_prompts(source: str) -> list[Prompt]:
    """Every prompt of a source, in the source's order.

    Args:
        source: one of

            * ``embedded:<category>`` or ``embedded:<category>-heldout``: prompts of the embedded world;
              categories are ``color``, ``shape``, ``texture``, ``spatial``, ``numeracy``, ``complex``, ``all``;
            * ``t2i-compbench:<folder>:<category>`` or ``t2i-compbench:<folder>:<category>-val``: the training or the
              evaluation prompts of T2I-CompBench, from the benchmark's own files in a folder; see
              `loopfast.t2i_compbench`;
            * the path of a UTF-8 text file, one prompt a line, empty lines left out;
            * ``module:function``: a function without arguments that returns texts or `Prompt`\\ s. Modules in
              the current directory can be imported.

    Raises:
        ConfigError: the source does not exist, cannot be read, or holds no prompt.
    """
    scheme, _, name = source.partition(":")
    if scheme == "embedded":
        prompts = _from_embedded_world(source, name)
    elif scheme == "t2i-compbench":
        prompts = _from_t2i_compbench(source, name)
    elif _is_file(source):
        prompts = _from_text_file(source)
    elif is_reference(source):
        prompts = _from_function(source)
    else:
        raise ConfigError(f"prompts {source!r}: no such file; allowed: {_ALLOWED}")
    if not prompts:
        raise ConfigError(f"prompts {source!r}: there is no prompt in it")
    return prompts


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):
        return False


def _from_embedded_world(source: str, name: str) -> list[Prompt]:
    category, _, split = name.partition("-")
    try:
        captions = world.prompts(category, split or "train")
    except ValueError:
        known = ", ".join((*world.CATEGORIES, "all"))
        raise ConfigError(
            f"prompts {source!r}: no category {name!r}; allowed: {known}, each also with -validation or -heldout"
        ) from None
    return [Prompt(caption.text, {"category": caption.category}) for caption in captions]


def _from_t2i_compbench(source: str, name: str) -> list[Prompt]:
    directory, _, category = name.rpartition(":")
    category, _, split = category.partition("-")
    if not directory or category not in CATEGORIES or split not in ("", "val"):
        raise ConfigError(
            f"prompts {source!r}: allowed: t2i-compbench:<folder>:<category> with a category of "
            f"{', '.join(CATEGORIES)}, each also with -val"
        )
    try:
        found = read_category(Path(directory), category, split or "train")
    except ConfigError as error:
        raise ConfigError(f"prompts {source!r}: {error}") from None
    return [
        Prompt(p.text, {"category": category} | ({"aspects": list(p.aspects)} if p.aspects else {}))
        for p in found
    ]


def _from_text_file(source: str) -> list[Prompt]:
    try:
        lines = Path(source).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {source!r}: cannot be read: {error}") from None
    return [Prompt(line.strip()) for line in lines if line.strip()]


def _from_function(source: str) -> list[Prompt]:
    function = import_function(source)
    try:
        found = function()
        items = list(found) if isinstance(found, Iterable) and not isinstance(found, str | Mapping) else None
    except Exception as error:
        raise ConfigError(f"prompts {source!r}: raised {type(error).__name__}: {error}") from error
    if items is None:
        raise ConfigError(
            f"prompts {source!r}: returned {type(found).__name__}; allowed: a list of texts or Prompts"
        )
    prompts = []
    for index, item in enumerate(items):
        prompt = Prompt(item) if isinstance(item, str) else item
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ConfigError(
                f"prompts {source!r}: item {index} is {type(item).__name__}; allowed: text or a Prompt"
            )
        if not prompt.text.strip():
            raise ConfigError(f"prompts {source!r}: item {index} is empty")
        prompts.append(prompt)
    return prompts
