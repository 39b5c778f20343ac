"""The processor's name, instruction sets and 16-bit arithmetic. It needs only the base install."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_CPUINFO = Path("/proc/cpuinfo")

# Instruction sets, with their names in torch and in Linux.
_SETS = {
    "AVX2": ("avx2",),
    "FMA": ("fma3", "fma"),
    "AVX512F": ("avx512_f", "avx512f"),
    "AVX512_BF16": ("avx512_bf16",),
    "AVX512_FP16": ("avx512_fp16",),
    "AMX": ("amx_tile",),
    "AMX_BF16": ("amx_bf16",),
    "AMX_FP16": ("amx_fp16",),
    "NEON": ("neon", "asimd"),
    "SVE": ("sve",),
    "BF16": ("bf16",),
    "FP16": ("fp16_arith", "asimdhp"),
}
# Instruction sets that compute in a 16-bit type.
_COMPUTE = {
    "bfloat16": ("AVX512_BF16", "AMX_BF16", "BF16"),
    "float16": ("AVX512_FP16", "AMX_FP16", "FP16"),
}
# Environment variables that limit the instruction sets which libraries use.
_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "LOOPFAST_ISA",
)


def describe() -> Iterator[tuple[str, str]]:
    """Yields the processor's name, its instruction sets, limits of their use, and how it computes in 16 bits."""
    sets = instruction_sets()
    yield "model", model_name()
    yield "instructions", ", ".join(sets) or "unknown"
    yield "used by torch", torch.backends.cpu.get_cpu_capability()
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    if limits:
        yield "limited by", ", ".join(limits)
    for dtype, wanted in _COMPUTE.items():
        found = [name for name in wanted if name in sets]
        full = found and has_kernels(dtype)
        how = f"at full speed ({', '.join(found)})" if full else "emulated, slower than float32"
        if dtype == "float16" and not has_kernels(dtype):
            how += "; DeepSpeed refuses it (distributed.zero_stage 1 to 3)"
        yield dtype, how


def model_name() -> str:
    """Returns the processor's name, or ``unknown`` if the system does not give it."""
    named = _cpuinfo().get("model name") or _capabilities().get("cpu_name")
    return str(named or platform.processor() or platform.machine() or "unknown")


def instruction_sets() -> list[str]:
    """Returns the processor's instruction sets that matter here; none if the system does not list them."""
    cpuinfo = _cpuinfo()
    known = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    known.update(name for name, present in _capabilities().items() if present is True)
    return [name for name, names in _SETS.items() if known.intersection(names)]


def has_kernels(dtype: str) -> bool:
    """Returns whether oneDNN has kernels of a 16-bit type for this processor. DeepSpeed needs those of float16.

    Args:
        dtype: ``bfloat16`` or ``float16``.
    """
    name = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def _capabilities() -> Mapping[str, Any]:
    """Returns the processor's capabilities according to torch; older versions report none."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _cpuinfo() -> Mapping[str, str]:
    """Returns Linux's description of the first core; other systems have none."""
    try:
        first = _CPUINFO.read_text("utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
