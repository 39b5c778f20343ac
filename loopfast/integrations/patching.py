"""Puts a function in another's place, wherever it is bound by name, and takes it out again."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any

from loopfast.errors import LoopfastError, first_line

Function = Callable[..., Any]

NOISES = ("torch", "philox")

# An original and what has taken its place, the latest last. Only the last is bound.
_in_place: dict[Function, list[Function]] = {}


class Patch:
    """Replacements that hold from now until `undo`, or to the end of a ``with`` block.

    Patches may be nested, made twice and undone in any order: the latest that is not undone holds, and with the last
    of them the originals return. A module that binds the name while the patch holds gets the original back as well.

    Args:
        replacements: the original functions and what takes their places. One that is bound in a class is given with
            that class, others are replaced in every module.
    """

    def __init__(self, replacements: Sequence[tuple[Function, Function, type | None]]) -> None:
        self._replacements = list(replacements)
        for original, replacement, owner in self._replacements:
            chain = _in_place.setdefault(original, [original])
            _rebind(chain[-1], replacement, owner)
            chain.append(replacement)

    def undo(self) -> None:
        """Take the replacements out. Does nothing the second time."""
        while self._replacements:
            original, replacement, owner = self._replacements.pop()
            chain = _in_place[original]
            position = chain.index(replacement)
            # Bound only if it is the last of the chain.
            _rebind(replacement, chain[position - 1], owner)
            del chain[position]
            if len(chain) == 1:
                del _in_place[original]

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _rebind(old: Function, new: Function, owner: type | None) -> None:
    # The dictionaries are read directly: asking a lazy module for an attribute would import more modules.
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    for holder in [owner] if owner is not None else modules:
        for name, value in list(vars(holder).items()):
            if value is old:
                setattr(holder, name, new)


def import_target(feature: str, name: str, needs: str) -> ModuleType:
    """Import a module of the codebase to be patched.

    Args:
        feature: the function that asks, for the message.
        name: the module's full name.
        needs: what has to be installed, for the message.

    Raises:
        LoopfastError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # transformers' lazy modules raise RuntimeError
        reason = first_line(error)
        raise LoopfastError(f"{feature} needs {needs}: cannot import {name} ({reason})") from error


def find_original(feature: str, holder: Any, name: str, parameters: str) -> Function:
    """The function another codebase defines under a name, whatever has taken its place.

    Args:
        feature: the function that asks, for the message.
        holder: the module or class that defines it.
        name: the function's name.
        parameters: the names the version that is known takes, in order, separated by blanks.

    Raises:
        LoopfastError: it is missing or takes other parameters.
    """
    function = vars(holder).get(name)
    for original, chain in _in_place.items():
        if any(function is link for link in chain):
            function = original
    where = f"{holder.__name__}.{name}"
    if function is None:
        raise LoopfastError(f"{feature} does not know this version of {where}: it is not there")
    found = " ".join(inspect.signature(function).parameters)
    if found != parameters:
        raise LoopfastError(
            f"{feature} does not know this version of {where}: "
            f"it takes ({found.replace(' ', ', ')}), known is ({parameters.replace(' ', ', ')})"
        )
    return function


def check_noise(noise: str) -> None:
    """Check the option ``noise`` of a patch.

    Raises:
        ValueError: it is none of `NOISES`.
    """
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
