"""Keeps the results of a run: ``python -m benchmarks.keep RAW [FOLDER]``.

RAW is the output of ``pytest benchmarks --benchmark-only --benchmark-json=RAW``. The medians and their details go to
``FOLDER/<device>.json``, sorted, so that a commit shows what has changed.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

_MACHINE = ("device", "threads", "copy_gb_per_s", "python", "torch", "triton", "loopfast")
_MEASURED = (
    "bytes",
    "gb_per_s",
    "copy_share",
    "host_us",
    "launches",
    "peak_bytes",
    "images_per_s",
    "pairs_per_s",
    "ratio",
)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def slim(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of pytest-benchmark's output that is kept.

    Args:
        raw: the parsed JSON.

    Returns:
        ``machine`` (device, versions, date, backend), and ``results``: op → setting → competitor → median and quartile
        distance in microseconds, rounds, bytes and the values computed from them.

    Raises:
        ValueError: it contains no benchmark.
    """
    benchmarks = raw["benchmarks"]
    if not benchmarks:
        raise ValueError("no benchmark ran")
    results: dict[str, Any] = {}
    for benchmark in benchmarks:
        stats, info = benchmark["stats"], benchmark["extra_info"]
        entry = {
            "median_us": stats["median"] * 1e6,
            "iqr_us": stats["iqr"] * 1e6,
            "rounds": stats["rounds"],
            **{key: info[key] for key in _MEASURED if key in info},
        }
        competitors = results.setdefault(info["op"], {}).setdefault(info["setting"], {})
        competitors[info["competitor"]] = {key: _rounded(value) for key, value in entry.items()}
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    machine = {key: _rounded(infos[0][key]) for key in _MACHINE}
    backends = {info["backend"] for info in infos if info["backend"] is not None}
    return {
        "machine": machine | {"backend": ", ".join(sorted(backends)), "date": raw["datetime"][:10]},
        "results": results,
    }


def load(path: Path) -> dict[str, Any]:
    """Reads results, kept or raw.

    Args:
        path: a JSON file.

    Raises:
        ValueError: it is neither.
    """
    data = json.loads(path.read_text("utf-8"))
    if "benchmarks" in data:
        return slim(data)
    if not {"machine", "results"} <= data.keys():
        raise ValueError(f"{path} holds no benchmark results")
    return data


def device_slug(device: str) -> str:
    """Returns the name of a device as a file name."""
    plain = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b|@.*GHz", " ", device, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keep", description=__doc__)
    parser.add_argument("raw", type=Path, metavar="RAW")
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    kept = load(arguments.raw)
    path = arguments.folder / f"{device_slug(kept['machine']['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
