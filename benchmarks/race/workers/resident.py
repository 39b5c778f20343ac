"""The memory of a process."""

from __future__ import annotations

from pathlib import Path


def resident_peak() -> int:
    """Returns the most bytes this process has held since its start; getrusage's number is inherited from its parent."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
