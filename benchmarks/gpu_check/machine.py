"""The machine, what it lacks, and its ceilings."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

import loopfast
import loopfast_kernels
from benchmarks.machine import device_name
from benchmarks.timing import copy_bandwidth, durations, settle_heap

from .options import Options, parse
from .record import Record, first_line
from .stages import OPTIONAL, PACKAGES

_TOOLS = ("nvidia-smi", "ptxas", "ncu", "nsys", "compute-sanitizer")
_CARD = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "memory.used")


def main() -> int:
    """Measures, with a line for each figure; the exit status is 1 if a figure could not be measured."""
    options = parse(__doc__)
    record = Record.from_environment("machine")
    record.write("machine", **_machine(options))
    record.write("versions", **_versions())
    if options.device.type == "cuda":
        record.write("card", **_card())
    failed = False
    settle_heap()
    for what, measure in _ceilings(options):
        try:
            record.write(what, **measure())
        except Exception as error:
            failed = True
            record.write(what, error=first_line(error))
    record.write("lacking", **_lacking())  # last, as it imports everything
    return int(failed)


def _machine(options: Options) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device_name(options.device),
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "free_disk": shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free,
    }
    if options.device.type == "cuda":
        card = torch.cuda.get_device_properties(options.device)
        facts |= {
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "l2": card.L2_cache_size,
            "device_memory": card.total_memory,
            "device_free": torch.cuda.mem_get_info(options.device)[0],
        }
    return facts


def _versions() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "loopfast": loopfast.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": loopfast_kernels.info()["cpu"],
    }
    for package in {**PACKAGES, **OPTIONAL}.values():
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _lacking() -> dict[str, list[str]]:
    """Returns missing packages, grouped by whether they are needed here, missing programs, and the CPU's compiled
    kernels.
    """
    lacking = {"packages": _cannot_import(PACKAGES), "optional": _cannot_import(OPTIONAL)}
    lacking["programs"] = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if loopfast_kernels.info()["cpu"] != "native":
        lacking["libraries"] = ["libloopfast.so, the CPU's kernels: pip install -e . builds it"]
    return {kind: names for kind, names in lacking.items() if names}


def _cannot_import(modules: dict[str, str]) -> list[str]:
    """Returns the packages that cannot be imported, with how to install them or with the import's error."""
    said = []
    for module, package in modules.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name == module
            said.append(
                f"{package} (pip install {package})" if missing else f"{package}: {first_line(error)}"
            )
        except Exception as error:  # a library built for another torch may raise any error
            said.append(f"{package}: {first_line(error)}")
    return said


def _card() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        return {"said": "there is no nvidia-smi"}
    command = ["nvidia-smi", f"--query-gpu={','.join(_CARD)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        return {"said": (done.stderr or done.stdout).strip()[:200]}
    cells = [cell.strip() for cell in done.stdout.splitlines()[0].split(",")]
    return dict(zip(_CARD, cells, strict=False))


def _ceilings(options: Options) -> list[tuple[str, Any]]:
    megabytes = 64 if options.small else 1024
    kinds = [("bfloat16", torch.bfloat16, False), ("float32", torch.float32, False)]
    if options.device.type == "cuda":
        kinds.append(("tf32", torch.float32, True))
    products = [
        (f"matmul {name}", lambda dtype=dtype, tf32=tf32: _product(options, dtype, tf32))
        for name, dtype, tf32 in kinds
    ]
    return [("copy", lambda: {"gb_per_s": copy_bandwidth(options.device, megabytes) / 1e9}), *products]


def _product(options: Options, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """Returns the teraflop/s of a product of square matrices."""
    size = 512 if options.small else 8192
    left, right = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        seconds = durations(lambda pair: pair[0] @ pair[1], [(left, right)], options.device, budget=0.3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"size": size, "tflops": 2 * size**3 / median(seconds) / 1e12}


if __name__ == "__main__":
    sys.exit(main())
