"""Kernels with the defects that the compile gate detects, and its command's output; a program for its test."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "profiles"))

import ptx_report
import torch
import triton
import triton.language as tl


@triton.jit
def double(values):
    offsets = tl.arange(0, 1024)
    tl.store(values + offsets, (tl.load(values + offsets).to(tl.float64) / 3.0).to(tl.float32))


@triton.jit
def narrow(values):
    offsets = tl.arange(0, 1024)
    tl.store(values + offsets, tl.load(values + 1 + offsets))


@triton.jit
def spilling(values):
    offsets = tl.arange(0, 16384)
    kept = tl.load(values + offsets)
    tl.store(values + offsets, kept / tl.sum(kept, axis=0))


@triton.jit
def contracted(values):
    offsets = tl.arange(0, 1024)
    loaded = tl.load(values + offsets)
    tl.store(values + offsets, tl.log(loaded * loaded + 1.5))


@triton.jit
def sound(values):
    offsets = tl.arange(0, 1024)
    tl.store(values + offsets, tl.log(tl.load(values + offsets) * 2.0))


VALUES = torch.empty(16384, device="meta")
kernels = {}
for kernel, warps in ((double, 4), (narrow, 4), (spilling, 1), (contracted, 4), (sound, 4)):
    (compiled,) = ptx_report.compiled_launches(90, lambda k=kernel, w=warps: k[(1,)](VALUES, num_warps=w))
    inspected = ptx_report.inspect(compiled, "a variant", 90)
    kernels[inspected.name] = asdict(inspected) | {"defects": ptx_report.defects(inspected)}

checks = []
ptx_report.ARCHITECTURES = (90,)
for spilled, arguments in product((0, 12), (["--check"], [])):
    ptx_report.compile_all = lambda architecture, s=spilled: [replace(inspected, spilled_bytes=s)]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as said:
        ptx_report.REPORT = Path(folder) / "ptx.md"
        code = ptx_report.main(arguments)
        checks.append((spilled, arguments, code, said.getvalue(), ptx_report.REPORT.exists()))
print(json.dumps({"kernels": kernels, "checks": checks}))
