"""The user's own code, named in a configuration as ``module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopfast.errors import ConfigError

__all__ = ["import_function", "is_reference", "reference_of_path", "reference_to", "source_file"]

_REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

_PATH = re.compile(
    r"(?P<folder>(?:[^:]*/)?)(?P<module>[^/:]+?)(?P<ending>(?:\.py)?):(?P<function>[A-Za-z_]\w*)"
)


def is_reference(text: str) -> bool:
    """Returns whether ``text`` has the form ``module:function``; the module may have dots."""
    return _REFERENCE.fullmatch(text) is not None


def reference_of_path(text: str) -> str | None:
    """Returns advice on writing a function in a file, such as ``./prompts.py:fn``, as ``module:function``.

    Modules are imported from the current directory, so the advice may be to start loopfast elsewhere. None if ``text``
    names no function in a file.
    """
    match = _PATH.fullmatch(text)
    if match is None or not (match["folder"] or match["ending"]):
        return None
    folder, module, function = Path(match["folder"] or "."), match["module"], match["function"]
    advice = "a function is written module:function"
    if not module.isidentifier():
        return f"{advice}, and {module!r} cannot be the name of a module; rename the file to letters, digits and _"
    if all(part.isidentifier() for part in folder.parts):
        return f"{advice}: write {'.'.join((*folder.parts, module))}:{function}"
    return f"{advice}: write {module}:{function}, and start loopfast in the folder {str(folder)!r}"


def import_function(reference: str) -> Callable[..., Any]:
    """Imports the callable that ``module:function`` names. As under ``python -m``, the current directory is searched.

    Raises:
        ConfigError: the text has another form, the module cannot be imported, or it has no such callable.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or match[1].endswith(".py"):
        advice = reference_of_path(reference)
        raise ConfigError(f"{reference!r}: {advice or 'allowed: module:function'}")
    module_name, function_name = match.groups()
    here = _search_here()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{reference!r}: cannot import {module_name!r} (searched from {here}): {reason}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        state = "is not a function" if hasattr(module, function_name) else "does not exist"
        origin = getattr(module, "__file__", None) or module_name
        raise ConfigError(f"{reference!r}: {function_name!r} {state} in {origin}")
    return function


def reference_to(function: object) -> str | None:
    """Returns the ``module:function`` by which another process can import a function; None if there is none."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    reference = f"{module}:{name}"
    if module in (None, "__main__") or not is_reference(reference):
        return None
    return reference if getattr(sys.modules.get(str(module)), name, None) is function else None


def source_file(reference: str) -> Path | None:
    """Returns the file of the module that ``module:function`` names; None if there is none."""
    name = reference.partition(":")[0]
    _search_here()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: a program made the module
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


def _search_here() -> str:
    """Adds the current directory to the path of modules, and returns it."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return here
