"""Checks whether the installed xformers fits this torch, without importing it. It needs only the base install."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from pathlib import Path

import torch

from loopfast.errors import first_line


def why_unusable() -> str | None:
    """Returns why the kernels of the installed xformers cannot be used with this torch, or None if they can.

    A wheel's kernels are linked to one major version of CUDA. They use torch's stable interface, so a wheel also works
    with later versions of torch, unless it requires exactly one.
    """
    folder = _folder()
    if folder is None:
        return "it is not installed; pip install 'loopfast[xformers]'"
    try:
        built = json.loads((folder / "cpp_lib.json").read_text("utf-8"))["version"]
        version, cuda = str(built["torch"]), built["cuda"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no kernels (a readable cpp_lib.json is missing in its folder)"
    here = f"this is torch {torch.__version__} for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'no CUDA'}"
    if cuda is None:
        return f"it was built for torch {version} without CUDA, and {here}"
    if torch.version.cuda is None or cuda // 100 != int(torch.version.cuda.partition(".")[0]):
        return f"it was built for torch {version}, whose CUDA is {cuda // 100}.{cuda % 100}, and {here}"
    pinned = _pinned_torch()
    if pinned is not None and pinned != torch.__version__.partition("+")[0]:
        return f"it needs torch {pinned} exactly, and {here}"
    return None


def describe() -> str:
    """Loads the kernels of the installed xformers, and returns whether that works."""
    reason = why_unusable()
    if reason is None:
        library = next(iter((_folder() or Path()).glob("_C*.so")), None)
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            reason = first_line(error)
    return "its kernels load" if reason is None else f"its kernels cannot load: {reason}"


def _folder() -> Path | None:
    found = importlib.util.find_spec("xformers")
    places = None if found is None else found.submodule_search_locations
    return Path(next(iter(places))) if places else None


def _pinned_torch() -> str | None:
    """Returns the version of torch that xformers requires, or None if it accepts several."""
    try:
        requirements = metadata.requires("xformers") or []
    except metadata.PackageNotFoundError:
        return None
    pins = [text.partition("==")[2].strip() for text in requirements if text.startswith("torch==")]
    return pins[0] if pins else None
