"""Replaces a function by another wherever it is bound by name, and undoes that."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from loopfast.errors import LoopfastError, first_line

Function = Callable[..., Any]

NOISES = ("torch", "philox")

# Each original, with the functions that have replaced it, the latest last. Only the last is bound.
_in_place: dict[Function, list[Function]] = {}


class Patch:
    """Replacements that hold until `undo`, or until the end of a ``with`` block.

    Patches may be nested, made twice and undone in any order. The latest one that is not undone holds; when the last
    one is undone, the originals return, also in modules that have bound the name in the meantime.

    Args:
        replacements: each original function, its replacement, and the class that binds it. With None for the class the
            function is replaced in every module.
    """

    def __init__(self, replacements: Sequence[tuple[Function, Function, type | None]]) -> None:
        self._replacements = list(replacements)
        for original, replacement, owner in self._replacements:
            chain = _in_place.setdefault(original, [original])
            _rebind(chain[-1], replacement, owner)
            chain.append(replacement)

    def undo(self) -> None:
        """Puts the originals back. A second call does nothing."""
        while self._replacements:
            original, replacement, owner = self._replacements.pop()
            chain = _in_place[original]
            position = chain.index(replacement)
            # This changes something only if the replacement is the last of its chain.
            _rebind(replacement, chain[position - 1], owner)
            del chain[position]
            if len(chain) == 1:
                del _in_place[original]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _rebind(old: Function, new: Function, owner: type | None) -> None:
    # Read the dictionaries directly: looking up an attribute of a lazy module would import more modules.
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    for holder in [owner] if owner is not None else modules:
        for name, value in list(vars(holder).items()):
            if value is old:
                setattr(holder, name, new)


def import_target(feature: str, name: str, needs: str) -> ModuleType:
    """Imports a module of the codebase to patch. The message of an error names the feature and the needed package.

    Raises:
        LoopfastError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # transformers' lazy modules raise RuntimeError
        reason = first_line(error)
        raise LoopfastError(f"{feature} needs {needs}: cannot import {name} ({reason})") from error


def find_original(feature: str, holder: Any, name: str, parameters: str) -> Function:
    """Finds the original function that another codebase defines under a name, even if it has been replaced.

    Args:
        feature: the calling function, for the message.
        holder: the module or class that defines the function.
        parameters: the parameters of the known version, in order, separated by blanks.

    Raises:
        LoopfastError: the function is missing or has other parameters.
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
    """Raises `ValueError` if a patch's option ``noise`` is not one of `NOISES`."""
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
