"""Compiles every Triton kernel for several GPU architectures, without a GPU, and reports the result.

``python profiles/ptx_report.py`` writes ``profiles/ptx.md``; with ``--check`` it writes nothing. Both name each defect,
and fail if there is one: double precision instructions, contracted multiply-adds, register spills, or a load or store
of latents that is not 16 bytes wide. They compile with the installed triton, which takes some minutes.

The program calls the ops' own functions, with tensors that have no data and a driver that has no device; each launch
stops after its compilation. So the compiled kernels are those that a GPU would receive.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The interpreter compiles nothing; triton reads this when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from loopfast_kernels.denoise_step import triton_kernels as denoise
from loopfast_kernels.group_norm_silu import triton_kernels as norm
from loopfast_kernels.leave_one_out import triton_kernels as group
from loopfast_kernels.loop_loss import triton_kernels as loss
from loopfast_kernels.loop_loss.reference import Options, Rewards
from loopfast_kernels.philox import triton_kernels as philox
from loopfast_kernels.transition import Transition
from loopfast_kernels.transition_logprob import triton_kernels as transition
from loopfast_kernels.triton_common import shorten

ARCHITECTURES = (80, 90, 100)
REPORT = Path(__file__).parent / "ptx.md"

_WIDE = 16
_BYTES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16}
_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.(b8|b16|b32|b64|b128)\s")
# The library's logarithm consists of such instructions too, but flushes denormals (ftz). A multiplication and an
# addition that the compiler has paired do not.
_CONTRACTED = re.compile(r"^\s*(?:@!?%\w+ )?(?:fma|mad)\.r[nzmp]\.(?!ftz)", re.MULTILINE)
_ELEMENT_BITS = re.compile(r"tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>")


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        variant: the arguments it was compiled for.
        architecture: compute capability, such as 90.
        loads: the number of global load instructions for each number of bytes.
        wide: the loads and stores of whole tensors are as few instructions of 16 bytes as possible.
        double: it has double precision instructions.
        contracted: the number of multiplications that the compiler has paired with additions, which changes rounding.
    """

    name: str
    variant: str
    architecture: int
    warps: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    wide: bool
    double: bool
    contracted: int


class _NoDevice:
    """The part of a driver that triton needs before it launches."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(architecture: int, call: Callable[[], Any]) -> list[Any]:
    """Returns the kernels that `call` would launch, compiled."""
    launches = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launches.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return launches[-1]

    driver.set_active(_NoDevice(architecture))
    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def _assembled(ptx: str, architecture: int) -> str:
    """Returns the output of ptxas for a program; it is kept in triton's cache."""
    ptxas = get_ptxas(architecture)
    kept = get_cache_manager(hashlib.sha256(f"{ptxas.version} {ptx}".encode()).hexdigest())
    if (file := kept.get_file("ptxas.log")) is not None:
        return Path(file).read_text()
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas.path, "-v", "--fmad=false", f"--gpu-name={target[1]}", file.name]
        run = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True)
    kept.put(run.stderr, "ptxas.log", binary=False)
    return run.stderr


def _accesses(ptx: str, kind: str) -> dict[int, int]:
    counts: dict[int, int] = {}
    for operation, vector, element in _ACCESS.findall(ptx):
        if operation == kind:
            width = int(vector or 1) * _BYTES[element]
            counts[width] = counts.get(width, 0) + 1
    return counts


def _is_wide(counts: dict[int, int], ttgir: str, kind: str, threads: int) -> bool:
    """Returns whether tensors with 16 bytes or more for each thread are moved 16 bytes at a time."""
    moved = 0
    for line in ttgir.splitlines():
        if f"tt.{kind} " in line and (tensor := _ELEMENT_BITS.search(line)):
            size = int(tensor[2]) // 8
            for dimension in tensor[1].split("x"):
                size *= int(dimension)
            moved += size // (_WIDE * threads)
    # Small tensors may be moved in 16 bytes too.
    return moved * _WIDE <= sum(width * count for width, count in counts.items() if width >= _WIDE)


def inspect(kernel: Any, variant: str, architecture: int) -> Kernel:
    """Measures a compiled kernel."""
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    log = _assembled(ptx, architecture)
    warps = kernel.metadata.num_warps
    loads, stores = _accesses(ptx, "ld"), _accesses(ptx, "st")
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spilled is not None
    assert registers is not None
    return Kernel(
        name=kernel.metadata.name,
        variant=variant,
        architecture=architecture,
        warps=warps,
        registers=int(registers[1]),
        shared_bytes=kernel.metadata.shared,
        spilled_bytes=sum(map(int, spilled.groups())),
        loads=loads,
        stores=stores,
        wide=_is_wide(loads, ttgir, "load", warps * 32) and _is_wide(stores, ttgir, "store", warps * 32),
        double=".f64" in ptx,
        contracted=len(_CONTRACTED.findall(ptx)),
    )


def calls(
    rows: int, elements: int, dtype: torch.dtype, guided: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields calls of every op for one shape, each with the words that tell it from the others."""

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    latents = empty(rows, elements, of=dtype)
    uncond, scale = (latents, 2.0) if guided else (None, 1.0)
    table, by_row, indices = empty(4, 3), empty(rows), empty(rows, of=torch.int64)
    step = Transition(latents, latents, table, indices, uncond, scale)
    yield "", lambda: denoise.denoise_step(step, indices, "mean")
    yield "", lambda: transition.transition_logprob(step, latents, "mean")
    yield "", lambda: transition.transition_logprob_backward(by_row, step, latents, "mean")
    copies = 2 if guided else 1
    store, counter = empty(5, rows, elements, of=dtype), empty(1, of=torch.int64)
    in_place = step._replace(sample=store, step=counter)
    model_input = empty(copies * rows, elements, of=dtype)
    yield (
        f"{copies} copies",
        lambda: denoise.denoise_step_(in_place, empty(4, rows), model_input, indices, "mean"),
    )
    rewards = Rewards(empty(4, 5), indices, empty(), 5.0)
    options = Options(1e-4, None, 0.1, "mean", True, guided)
    with_reference = options._replace(reference_output=latents)
    yield "", lambda: loss.loop_loss(step, latents, by_row, rewards, options)
    yield "reference", lambda: loss.loop_loss(step, latents, by_row, rewards, with_reference)
    yield "given advantages", lambda: loss.clipped_loss(step, latents, by_row, by_row, with_reference)
    scales = by_row if dtype == torch.float16 else empty(0)
    grads = (latents, latents if guided else empty(0))
    yield "", lambda: loss.scale_gradients_(*grads, scales, empty())
    yield "", lambda: philox.philox_normal(indices, indices, (rows, elements))
    yield "", lambda: group.leave_one_out(empty(4, 5))
    # These are the partial sums of a row of a million elements.
    yield "", lambda: shorten(empty(rows, 32768))


def image_calls(rows: int, elements: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields calls of the op on images for rows of some elements, each with the words that tell it from the others."""
    size, groups = ((7, 11, 13), 7) if elements == 1001 else ((64, elements // 512, 8), 8)

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    contiguous, affine, statistics = empty(rows, *size, of=dtype), empty(size[0]), empty(rows, groups, 3)
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    given = (
        ("", contiguous, None),
        ("channels last shifted", channels_last, empty(rows, size[0], of=dtype)),
    )
    for detail, image, shift in given:
        inputs, wanted = (image, affine, affine, shift), [True, True, True, shift is not None]
        yield detail, lambda i=inputs: norm.group_norm_silu(*i, groups, 1e-5)
        yield (
            detail,
            lambda i=inputs, w=wanted: norm.group_norm_silu_backward(i[0], *i, statistics, groups, 1e-5, w),
        )


SHAPES = {4096: "4x32x32", 16384: "4x64x64", 65536: "4x128x128", 36864: "4x96x96", 1001: "1001"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compile_all(
    architecture: int,
    elements: Sequence[int] = tuple(SHAPES),
    dtypes: Sequence[torch.dtype] = _DTYPES,
    guidance: Sequence[bool] = (False, True),
    images: bool = True,
) -> Iterator[Kernel]:
    """Yields every kernel of every op, each variant once."""
    seen = set()
    for size in elements:
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            parts = [("guided" if guided else "", calls(16, size, dtype, guided)) for guided in guidance]
            if images:
                parts.append(("", image_calls(16, size, dtype)))
            for part, of_part in parts:
                for detail, call in of_part:
                    words = (SHAPES[size], name, part, detail)
                    for kernel in compiled_launches(architecture, call):
                        if kernel.hash not in seen:
                            seen.add(kernel.hash)
                            yield inspect(kernel, " ".join(filter(None, words)), architecture)


def defects(kernel: Kernel) -> list[str]:
    """Returns the defects of a kernel."""
    found = []
    if kernel.double:
        found.append("double precision")
    if kernel.contracted:
        found.append(f"{kernel.contracted} contracted multiply-adds")
    if kernel.spilled_bytes:
        found.append(f"{kernel.spilled_bytes} bytes spilled")
    # Rows of an odd length start anywhere: no access wider than an element is aligned.
    if not kernel.wide and not kernel.variant.startswith("1001"):
        found.append(f"not 16 bytes wide: loads {kernel.loads}, stores {kernel.stores}")
    return found


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{count} x {width} B" for width, count in sorted(counts.items(), reverse=True))


def write_report(kernels: list[Kernel]) -> None:
    """Writes `REPORT`."""
    lines = [
        "# The Triton kernels, compiled",
        "",
        f"Made by `python profiles/ptx_report.py` with triton {triton.__version__}; nothing here ran on a GPU.",
        "Loads and stores are instructions of one thread. Those of 4 and 8 bytes move a row's scalars; latents move",
        "16 bytes at a time, except in rows of 1001 elements, which are not aligned.",
    ]
    for architecture in ARCHITECTURES:
        lines += [
            "",
            f"## sm_{architecture}",
            "",
            "| kernel | variant | warps | registers | shared bytes | spilled | loads | stores | defects |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| `{k.name}` | {k.variant} | {k.warps} | {k.registers} | {k.shared_bytes} | {k.spilled_bytes} "
            f"| {_widths(k.loads)} | {_widths(k.stores)} | {'; '.join(defects(k)) or '-'} |"
            for k in kernels
            if k.architecture == architecture
        ]
    REPORT.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, reports, and fails if a kernel has a defect.

    Returns:
        1 with a defect, else 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--json", action="store_true", help="print a selection as JSON; write no report")
    only.add_argument("--check", action="store_true", help="name the defects; write no report")
    options = parser.parse_args(arguments)
    if options.json:
        guided = (True,)
        kernels = list(compile_all(90, (16384,), (torch.bfloat16,)))
        kernels += compile_all(90, (16384,), (torch.float32, torch.float16), guided, images=False)
        kernels += compile_all(90, (65536,), (torch.bfloat16,), guided, images=False)
        kernels += compile_all(90, (1001,), (torch.float32,), guided, images=False)
        for architecture in (80, 100):
            kernels += compile_all(architecture, (16384,), (torch.bfloat16,), guided, images=False)
        print(json.dumps([{**asdict(kernel), "defects": defects(kernel)} for kernel in kernels]))
        return 0
    began = time.monotonic()
    kernels = [kernel for arch in ARCHITECTURES for kernel in compile_all(arch)]
    if not options.check:
        write_report(kernels)
    broken = [
        f"sm_{k.architecture} {k.name} ({k.variant}): {'; '.join(defects(k))}" for k in kernels if defects(k)
    ]
    architectures = ", ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    print(
        f"triton {triton.__version__}, {architectures}: {len(kernels)} kernels, {len(broken)} with defects, "
        f"{time.monotonic() - began:.0f} s",
        *broken,
        sep="\n",
    )
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
