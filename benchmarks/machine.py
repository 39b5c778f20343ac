"""The name of a machine in the results."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def device_name(where: torch.device) -> str:
    """Returns the GPU's name, or the CPU's with its number of cores."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
