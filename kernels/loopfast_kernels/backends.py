"""Choice of the backend that runs an op.

An op has an implementation in each backend. The innermost `backend` context names the one that runs; without a context
the environment variable ``LOOPFAST_BACKEND`` names it, as it was when this package was imported; without either it is
the best for the device. A backend that is named is never replaced by another: if it cannot serve the call, the call
fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from . import native_library

VARIABLE = "LOOPFAST_BACKEND"

BACKENDS = ("reference", "native", "triton")
"""The backends a request may name; `info` describes what each can serve on this machine."""

_MODULES = {"reference": "reference", "native": "native", "triton": "triton_kernels"}
_PREFERRED = {"cpu": "native", "cuda": "triton"}

# It is process-wide and no context variable: autograd runs backward passes on threads of its own. The environment is
# read once: to look a variable up takes as long as to allocate a result.
_requested: str | None = os.environ.get(VARIABLE) or None


class BackendUnavailableError(RuntimeError):
    """Error of a backend that was asked for by name and cannot serve the call."""


def triton_interprets() -> bool:
    """Returns whether Triton interprets its kernels on the CPU; this is fixed when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing(name: str) -> str | None:
    """Returns why a backend can serve nothing on this machine, or None if it can serve something."""
    if name == "native":
        return native_library.missing()
    if name == "triton" and find_spec("triton") is None:
        return "triton is not installed"
    return None


def _obstacle(name: str, device: str, double: bool) -> str | None:
    """Returns why a backend cannot serve a device, or float64; None if it can."""
    if name == "reference":
        return None
    missing = _missing(name)
    if missing is not None:
        return missing
    if name == "native" and device != "cpu":
        return f"it serves the CPU, not {device}"
    if name == "triton" and device != "cuda" and not (device == "cpu" and triton_interprets()):
        return f"it serves CUDA devices, not {device} (TRITON_INTERPRET=1 interprets it on the CPU)"
    return "it does not take float64" if double else None


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} names an unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    missing = None if name == "reference" else _missing(name)
    if missing is not None:
        raise BackendUnavailableError(f"{origin} asks for the backend {name!r}, which is missing: {missing}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Context in which the ops run on one backend, in every thread of the process.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailableError: the backend is missing. In the context, an op that is called with tensors that the
            backend cannot serve raises it too.
    """
    global _requested
    previous, _requested = _requested, _checked(name, "backend()")
    try:
        yield
    finally:
        _requested = previous


@cache
def _implementation(
    package: str, function: str, name: str | None, device: str, double: bool
) -> Callable[..., Any]:
    if name is None:
        name = _PREFERRED.get(device, "reference")
        if _obstacle(name, device, double) is not None:
            name = "reference"
    else:
        # A context has checked its backend; this checks the environment's.
        obstacle = _obstacle(_checked(name, VARIABLE), device, double)
        if obstacle is not None:
            raise BackendUnavailableError(f"{function} cannot run on the backend {name!r}: {obstacle}")
    # This imports triton, for the first op that runs on it.
    module = import_module(f".{_MODULES[name]}", package)
    return cast(Callable[..., Any], getattr(module, function))


class Implementations:
    """A function of an op in every backend.

    Args:
        package: the op's package, with a module for each backend.
        function: the function's name in each module.
    """

    def __init__(self, package: str, function: str) -> None:
        self._package = package
        self._function = function

    def choose(self, *latents: Tensor | None) -> Callable[..., Any]:
        """Returns the implementation that serves some tensors.

        Args:
            latents: the tensors whose dtype and device matter; the first is not None.

        Raises:
            ValueError: ``LOOPFAST_BACKEND`` held an unknown name.
            BackendUnavailableError: the backend asked for cannot serve them.
        """
        first = latents[0]
        assert first is not None
        double = torch.float64 in [latent.dtype for latent in latents if latent is not None]
        return _implementation(self._package, self._function, _requested, first.device.type, double)


def info() -> dict[str, str]:
    """Describes the installation, for a diagnosis or the header of a run.

    Returns:
        ``cpu`` and ``cuda``: the backend that serves the device unless another is asked for, and why it is not the
        fastest. ``native`` and ``triton``: the version, or why it is missing. ``requested``: the backend that the
        context or the environment names, or ``"by device"``.
    """
    serving = {}
    for device, name in _PREFERRED.items():
        obstacle = _missing(name)
        serving[device] = name if obstacle is None else f"reference ({name} is missing: {obstacle})"
    if not torch.cuda.is_available():
        serving["cuda"] += ", but no device was found"
    triton = _missing("triton")
    if triton is None:
        triton = version("triton") + (" (interpreted on the CPU)" if triton_interprets() else "")
    return {
        **serving,
        "native": _missing("native") or native_library.describe(),
        "triton": triton,
        "requested": _requested or "by device",
    }
