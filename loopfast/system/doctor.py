"""The report of ``loopfast doctor`` about an installation. It needs only the base install."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata

import torch

import loopfast_kernels
from loopfast.system import processor, xformers_build
from loopfast.version import __version__

__all__ = ["examine"]


def examine() -> str:
    """Returns versions, devices, backends and extras as text, one fact per line.

    The line of a missing package contains the command that installs it.
    """
    sections = {
        "loopfast": [
            ("loopfast", __version__),
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("platform", platform.platform()),
        ],
        "processor": processor.describe(),
        "devices": _devices(),
        "kernels": iter(loopfast_kernels.info().items()),
        "extras": _extras(),
    }
    lines: list[str] = []
    for title, facts in sections.items():
        rows = list(facts)
        width = max(len(name) for name, _ in rows)
        lines += ["", title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join(lines[1:])


def _devices() -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cpu", f"{cores} core(s) usable, {torch.get_num_threads()} thread(s) in torch"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield (
            "gpu",
            f"none found (torch is built for {built})" if built else "none (torch is built for the CPU)",
        )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"


def _extras() -> Iterator[tuple[str, str]]:
    """Yields each extra of the installed distribution with its packages, or those that are missing."""
    try:
        requirements = metadata.requires("loopfast") or []
    except metadata.PackageNotFoundError:
        yield "unknown", "loopfast is not installed here: pip install -e '.[train]' in its folder"
        return
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match:
            packages.setdefault(match[2], []).append(match[1])
    for extra, names in packages.items():
        versions = {name: _installed_version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        if missing:
            yield extra, f"missing {', '.join(missing)}: pip install 'loopfast[{extra}]'"
        else:
            found = ", ".join(f"{name} {version}" for name, version in versions.items())
            yield extra, f"{found}: {xformers_build.describe()}" if extra == "xformers" else found


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
