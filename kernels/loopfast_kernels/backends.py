"""Which implementation of an op runs.

An op offers implementations by name. The one that runs is, in this order: the one named by the innermost
`backend` context, the one named by the environment variable ``LOOPFAST_BACKEND``, the best for the device.
A backend asked for by name is never replaced by another: if it is not there, the call fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from . import native

VARIABLE = "LOOPFAST_BACKEND"

BACKENDS = ("reference", "native", "triton")
"""Every backend a request may name; `AVAILABLE` are those this version has."""

AVAILABLE = ("reference",)

Implementation = TypeVar("Implementation")

# Process-wide rather than a context variable: autograd runs backward passes on threads of its own.
_override: str | None = None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run."""


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} names an unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if name not in AVAILABLE:
        raise BackendUnavailableError(
            f"{origin} asks for the backend {name!r}, which is not available in this version; "
            f"available: {', '.join(AVAILABLE)}"
        )
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one backend, in every thread of the process.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailableError: the backend cannot run here.
    """
    global _override
    previous, _override = _override, _checked(name, "backend()")
    try:
        yield
    finally:
        _override = previous


def choose(implementations: Mapping[str, Implementation]) -> Implementation:
    """Pick an op's implementation.

    Args:
        implementations: by backend name; ``"reference"`` is always among them.

    Raises:
        ValueError: ``LOOPFAST_BACKEND`` holds an unknown name.
        BackendUnavailableError: the backend asked for cannot run.
    """
    if _override is not None:
        return implementations[_override]
    requested = os.environ.get(VARIABLE)
    if requested:
        return implementations[_checked(requested, VARIABLE)]
    return implementations["reference"]


def info() -> dict[str, str]:
    """Describe the installation: one line per fact, for a diagnosis or the header of a run.

    Returns:
        ``backends`` (those available), ``requested`` (by the context or the environment, or ``"by device"``),
        ``native_library`` (version and processor features, or why it is missing).
    """
    try:
        library = native.load()
    except OSError as error:
        described = f"cannot be loaded: {error}"
    else:
        if library is None:
            described = "not built (the package was not installed)"
        else:
            features = " ".join(library.cpu_features) or "no known processor features"
            described = f"{library.version} ({features})"
    return {
        "backends": ", ".join(AVAILABLE),
        "requested": _override or os.environ.get(VARIABLE) or "by device",
        "native_library": described,
    }
