"""The ops' kernels under Nsight Compute, with the card's current clocks: none are locked."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .options import parse
from .programs import run_and_show
from .record import Record
from .runner import SKIPPED
from .stages import ROOT

_LAUNCHES = 24

# The figures of Nsight Compute that are kept, and their names here.
_METRICS = {
    "Duration": "duration_us",
    "DRAM Throughput": "dram_percent",
    "Memory Throughput": "memory_percent",
    "Compute (SM) Throughput": "sm_percent",
    "Achieved Occupancy": "occupancy_percent",
    "Theoretical Occupancy": "occupancy_limit_percent",
}
_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6}


def kernels() -> list[str]:
    """Returns the names of the package's Triton kernels."""
    found = set()
    for file in (ROOT / "kernels" / "loopfast_kernels").rglob("triton_*.py"):
        found |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text("utf-8"), re.M))
    return sorted(found)


def command(csv_file: Path, arguments: Sequence[str]) -> Sequence[str]:
    """Returns the command to run; the figures go to a file, separate from the program's output."""
    return (
        *("ncu", "--clock-control", "none", "--csv", "--page", "details", "--print-units", "base"),
        *(
            "--section",
            "SpeedOfLight",
            "--section",
            "Occupancy",
            "--log-file",
            str(csv_file),
            "--force-overwrite",
        ),
        *("--kernel-name", f"regex:^({'|'.join(kernels())})", "--launch-count", str(_LAUNCHES)),
        *(sys.executable, "-m", "benchmarks.gpu_check.bandwidth", "--once", *arguments),
    )


def figures(text: str) -> Iterator[dict[str, Any]]:
    """Returns Nsight Compute's output as figures of each launch.

    Args:
        text: its log: a table in CSV with a row for each metric of each launch, among messages that begin with ``==``.
    """
    rows = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(rows):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "grid": row["Grid Size"]})
        name = _METRICS.get(row["Metric Name"])
        if name is None:
            continue
        value = float(row["Metric Value"].replace(",", ""))
        launch[name] = value * _MICROSECONDS[row["Metric Unit"]] if name == "duration_us" else value
    yield from launches.values()


def main() -> int:
    """Runs each op once, and writes a line for each launch."""
    options = parse(__doc__)
    record = Record.from_environment("ncu")
    csv_file = Path(os.environ.get("TMPDIR", "/tmp")) / "ncu.csv"
    arguments = ("--device", options.device.type, *(["--small"] if options.small else []))
    status, output = run_and_show(command(csv_file, arguments))
    text = csv_file.read_text("utf-8", errors="replace") if csv_file.exists() else ""
    print(text)
    if "ERR_NVGPUCTRPERM" in text + output:
        record.write(
            "skipped", reason="this machine keeps the card's counters for administrators (ERR_NVGPUCTRPERM)"
        )
        return SKIPPED
    launches = list(figures(text))
    for launch in launches:
        record.write("kernel", **launch)
    if status or not launches:
        said = [line for line in (text + output).splitlines() if line.startswith("==ERROR==")]
        record.write("kernel", error=(said or [f"no figures; ncu's exit status is {status}"])[0][:300])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
