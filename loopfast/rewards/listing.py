"""The tables of ``loopfast rewards``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from loopfast.rewards.models.pretrained import COMMON_OPTIONS
from loopfast.rewards.registry import REWARDS, RewardInfo, find_reward

__all__ = ["all_rewards", "one_reward", "options_of"]


def all_rewards() -> RenderableType:
    """Makes a table with a row for each reward."""
    table = Table("name", "range", Column("weights", overflow="fold"), "license", "extra")
    table.columns[0].no_wrap = True
    for name, info in REWARDS.items():
        table.add_row(name, *(escape(fact) for fact in _facts(info).values()))
    end = "loopfast rewards NAME shows the options of one; your own is named module:function."
    return Group(table, escape(end))


def one_reward(name: str) -> RenderableType:
    """Makes the description of a reward, with a table of its options.

    Raises:
        ConfigError: the package has no reward of this name.
    """
    info = find_reward(name)
    about = inspect.getdoc(info.make) or ""
    table = Table("option", Column("default", overflow="fold"), "meaning")
    for option, default, meaning in options_of(info.make):
        table.add_row(option, escape(default), escape(meaning))
    parts: list[RenderableType] = [
        escape(f"{name}: {info.summary}"),
        "",
        escape(re.split(r"\n\n(?:Args|Returns|Raises):", about)[0]),
        "",
        *(escape(f"{fact}: {value}") for fact, value in _facts(info).items()),
    ]
    if table.row_count:
        parts += ["", table]
    return Group(*parts)


def _facts(info: RewardInfo) -> dict[str, str]:
    return {
        "range": info.range,
        "weights": info.weights or "none",
        "license": info.license or "none",
        "extra": info.extra or "train",
    }


def options_of(make: Callable[..., Any]) -> list[tuple[str, str, str]]:
    """Returns each option of a reward: name, default as YAML, and meaning from the docstring of ``make``."""
    meanings = COMMON_OPTIONS | _arguments(inspect.getdoc(make) or "")
    return [
        (name, "required" if option.default is option.empty else json.dumps(option.default), meanings[name])
        for name, option in inspect.signature(make).parameters.items()
    ]


def _arguments(docstring: str) -> dict[str, str]:
    """Returns the meaning of each argument in a docstring's section Args."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"^    (?=\S)", section[1], flags=re.MULTILINE)[1:] if section else ():
        names, _, meaning = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(meaning.split())
    return found
