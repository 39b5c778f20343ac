"""Kernels with the defects that the compile gate looks for; compiled as a program by its test."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
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
found = {}
for kernel, warps in ((double, 4), (narrow, 4), (spilling, 1), (contracted, 4), (sound, 4)):
    (compiled,) = ptx_report.compiled_launches(90, lambda k=kernel, w=warps: k[(1,)](VALUES, num_warps=w))
    inspected = ptx_report.inspect(compiled, "", 90)
    found[inspected.name] = asdict(inspected) | {"defects": ptx_report.defects(inspected)}
print(json.dumps(found))
