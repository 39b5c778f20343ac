"""The stages, the most important ones first: the command, the time and the needs of each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[2]
BROKEN_CAPTURE = "tests/rollout/test_broken_capture.py"

# Names of modules, by the package that installs them.
_TRAIN = {
    "accelerate": "accelerate",
    "diffusers": "diffusers",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "nvtx": "nvtx",
    "peft": "peft",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "yaml": "PyYAML",
    "requests": "requests",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
    "typer": "typer",
}
_TESTS = {"pytest": "pytest", "hypothesis": "hypothesis"}
_ZERO = {"deepspeed": "deepspeed"}
PACKAGES = {"torch": "torch", "triton": "triton"} | _TRAIN | _TESTS | _ZERO
OPTIONAL = {"xdist": "pytest-xdist", "pytest_timeout": "pytest-timeout", "xformers": "xformers"}
"""Packages that something here can use, by the name of their module."""


class Setting(NamedTuple):
    """The device and the sizes with which the stages run."""

    device: Literal["cuda", "cpu"]
    small: bool
    found: str | None
    """Name of the device; None: there is no such device."""


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: its name on the command line.
        about: what it checks or measures.
        seconds: its limit.
        command: its command, without the Python interpreter.
        packages: modules without which it cannot run, and the package that installs each.
        tool: a program without which it cannot run.
        gpu_only: whether it cannot measure anything on a CPU.
        file: a file of the repository without which it cannot run.
    """

    name: str
    about: str
    seconds: float
    command: Callable[[Setting], Sequence[str]]
    packages: Mapping[str, str] = MappingProxyType({})
    tool: str | None = None
    gpu_only: bool = False
    file: str | None = None

    def lacks(self, setting: Setting) -> str | None:
        """Returns why the stage cannot run here, or None."""
        missing = {"torch": "torch", **self.packages}
        missing = {module: package for module, package in missing.items() if not is_installed(module)}
        if missing:
            packages = " ".join(missing.values())
            return f"{', '.join(missing)} cannot be found: pip install {packages}"
        if self.gpu_only and setting.device == "cpu":
            return "it needs a GPU"
        if setting.found is None and self.name != "machine":
            return "no CUDA device was found; --device cpu --small tries the check itself without one"
        if self.tool is not None and shutil.which(self.tool) is None:
            return f"{self.tool} is not on the PATH; it comes with the CUDA toolkit"
        if self.file is not None and not (ROOT / self.file).exists():
            return f"there is no {self.file}"
        return None


def is_installed(module: str) -> bool:
    """Returns whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _module(*name: str) -> Callable[[Setting], Sequence[str]]:
    def command(setting: Setting) -> Sequence[str]:
        module, *arguments = name
        # what a machine lacks can be found out without a GPU, too
        sizes = ("--small",) if setting.small or setting.found is None else ()
        device = setting.device if setting.found is not None else "cpu"
        return ("-m", f"benchmarks.gpu_check.{module}", *arguments, "--device", device, *sizes)

    return command


def pytest_command(*selection: str, processes: int = 1, timeout: int = 90) -> Sequence[str]:
    """Returns a command that runs tests, each of which becomes a line of the record."""
    parallel = ("-n", str(processes)) if processes > 1 and is_installed("xdist") else ()
    limit = ("--timeout", str(timeout)) if is_installed("pytest_timeout") else ()
    plugins = ("-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.pytest_lines")
    return ("-m", "pytest", "-q", "--tb=short", *plugins, *parallel, *limit, *selection)


def _tests(gpu: Sequence[str], cpu: Sequence[str], processes: int = 1) -> Callable[[Setting], Sequence[str]]:
    def command(setting: Setting) -> Sequence[str]:
        if setting.device == "cpu":
            return pytest_command(*cpu)
        return pytest_command(*gpu, processes=min(processes, (os.cpu_count() or 1) // 2))

    return command


# Tests that are not marked `gpu` test Triton on the GPU, if there is one.
_OPS = ("test_gpu", "test_philox", "test_denoise_step", "test_transition_logprob", "test_loop_loss")
_LAST_OPS = ("test_leave_one_out", "test_reduction", "test_group_norm_silu")
_OP_FILES = [f"tests/kernels/{name}.py" for name in (*_OPS, *_LAST_OPS)]
_RECORDING_FILES = ("tests/rollout", "tests/test_profiling.py")
# A recording that is broken on purpose may break later work in its process.
_WHOLE_RECORDINGS = (f"--ignore={BROKEN_CAPTURE}",)

STAGES = (
    Stage(
        "machine",
        "the machine, versions, what is missing, and the ceilings: copy bandwidth and matrix products",
        30,
        _module("machine"),
    ),
    Stage(
        "ops",
        "each op against float64 and the CPU's bits, ratios of exactly 1, in every type",
        90,
        _tests(
            (*_OP_FILES, "-k", "gpu or triton"),
            ("tests/kernels/test_leave_one_out.py", "-k", "triton"),
            processes=8,
        ),
        _TESTS | {"triton": "triton", "numpy": "numpy"},
    ),
    Stage(
        "recording",
        "recorded denoising steps against the eager loop, bit by bit, for every family",
        60,
        _tests(
            (*_RECORDING_FILES, "-m", "gpu", *_WHOLE_RECORDINGS),
            ("tests/rollout/test_capture.py", "-k", "nothing_is_recorded"),
            processes=4,
        ),
        _TESTS | _TRAIN,
    ),
    Stage(
        "sd15",
        "training at Stable Diffusion 1.5's sizes, random weights: speed, memory and ratio by option",
        150,
        _module("measure", "sd15"),
        _TRAIN,
    ),
    Stage(
        "sd35",
        "training at Stable Diffusion 3.5 medium's sizes as Flow-GRPO does: images an hour, by phase",
        90,
        _module("measure", "sd35"),
        _TRAIN,
    ),
    Stage(
        "families",
        "a whole run of every family of models",
        60,
        _tests(
            ("tests/training/test_families.py", "-m", "gpu"),
            ("tests/training/test_families.py", "-k", "ratio_is_1_in_bfloat16 and sd35"),
            processes=4,
        ),
        _TESTS | _TRAIN,
    ),
    Stage(
        "bandwidth",
        "bandwidth and host time of the ops, against eager torch and torch.compile",
        60,
        _module("bandwidth"),
        {"triton": "triton"},
    ),
    Stage(
        "broken",
        "a recording that fails, and what works after it",
        40,
        _tests((BROKEN_CAPTURE, "-m", "gpu"), ()),
        _TESTS | _TRAIN,
        gpu_only=True,
        file=BROKEN_CAPTURE,
    ),
    Stage(
        "sanitizer",
        "some tests of the ops under compute-sanitizer's memcheck",
        60,
        _module("sanitizer"),
        _TESTS | {"triton": "triton"},
        tool="compute-sanitizer",
        gpu_only=True,
    ),
    Stage(
        "ncu",
        "the ops' kernels under Nsight Compute: duration, throughput, occupancy",
        60,
        _module("ncu"),
        {"triton": "triton"},
        tool="ncu",
        gpu_only=True,
    ),
    Stage(
        "zero3",
        "full training at SDXL's sizes: ZeRO-3 with offload, one process, against the local engine",
        180,
        _module("measure", "zero3"),
        _TRAIN | _ZERO,
    ),
)

NAMES = tuple(stage.name for stage in STAGES)


def patience(device: str) -> int:
    """Returns the factor by which limits are longer on a device: they are made for machines that have a GPU."""
    return 4 if device == "cpu" else 1


def task_command(stage: Stage, setting: Setting) -> Sequence[str]:
    """Returns the whole command of a stage."""
    return (sys.executable, *stage.command(setting))
