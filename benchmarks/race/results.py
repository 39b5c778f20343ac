"""The race's file of results, and the tables made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.keep import RESULTS, device_slug
from loopfast.reporting.tables import aligned_table

from .figures import PHASES
from .settings import merged

Json = dict[str, Any]


def path_for(device: str, folder: Path = RESULTS) -> Path:
    """Returns the path of a device's results."""
    return folder / f"race-{device_slug(device)}.json"


def load(path: Path) -> Json:
    """Reads results; returns an empty mapping if there are none yet."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def update(path: Path, part: Mapping[str, Any]) -> Json:
    """Adds to the file: sections are merged, and existing values are replaced."""
    results = rounded(merged(load(path), part))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
    return results


def rounded(value: Any) -> Any:
    """Returns a value with five significant digits, as many as a repetition would not change."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _megabytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2g} %" if 0 < share < 0.1 else f"{share:.0f} %"


def equal_work_table(results: Mapping[str, Any]) -> str:
    """Returns Markdown: an iteration of each trainer, phase by phase."""
    header = ("work", "trainer", "images/s", "iteration", *PHASES, "peak memory", "TRL / ours")
    rows = []
    for name, entry in results.get("equal_work", {}).items():
        for trainer in ("trl", "loopfast"):
            figures = entry[trainer]
            rows.append(
                (
                    name,
                    "TRL" if trainer == "trl" else "loopfast",
                    f"{figures['images_per_s']:.3g}",
                    f"{figures['seconds']:.2f} s",
                    *(f"{figures[phase]:.2f} s" for phase in PHASES),
                    _megabytes(figures["peak_bytes"]),
                    f"{entry['speedup']:.2f}×" if trainer == "loopfast" else "",
                )
            )
    return aligned_table(header, rows)


def ratio_table(results: Mapping[str, Any]) -> str:
    """Returns Markdown: the share of ratios outside the clip range before the first update."""
    rows = [
        (name, dtype, *(_percent(100 * shares[trainer]) for trainer in ("trl", "loopfast")))
        for name, entry in results.get("equal_work", {}).items()
        for dtype, shares in entry["ratios"].items()
    ]
    return aligned_table(("work", "dtype", "TRL", "loopfast"), rows)


def sweep_table(results: Mapping[str, Any]) -> str:
    """Returns Markdown: each trainer's settings and the validation reward that they reached."""
    rows = [
        (
            "TRL" if trainer == "trl" else "loopfast",
            entry["name"] + (" (chosen)" if entry["name"] == sweep["chosen"] else ""),
            str(entry["iterations"]),
            f"{entry['reward']:.3f}",
        )
        for trainer, sweep in results.get("sweep", {}).items()
        for entry in sorted(sweep["settings"], key=lambda entry: -entry["reward"])
    ]
    return aligned_table(("trainer", "setting", "iterations", "validation reward"), rows)


def reward_table(results: Mapping[str, Any]) -> str:
    """Returns Markdown: the time to TRL's reward, at each guidance of the evaluation."""
    rows = []
    for guidance, figures in results.get("time_to_reward", {}).get("figures", {}).items():
        ours, speedup = figures["loopfast_seconds"], figures["speedup"]
        rows.append(
            (
                guidance,
                f"{figures['target']:.3f}",
                f"{figures['trl_seconds']:.0f} s",
                "not reached" if ours is None else f"{ours:.0f} s",
                _seeds(figures["loopfast_seeds"]),
                "" if speedup is None else f"{speedup:.1f}×",
            )
        )
    header = ("guidance", "TRL's reward", "TRL", "loopfast", "each seed", "TRL / ours")
    return aligned_table(header, rows)


def _seeds(seconds: Iterable[float | None]) -> str:
    return ", ".join("–" if value is None else f"{value:.0f}" for value in seconds)


def report(results: Mapping[str, Any]) -> str:
    """Returns all tables that have results."""
    parts: Sequence[tuple[str, str, Any]] = (
        ("equal_work", "Equal work", equal_work_table),
        ("equal_work", "Ratios outside 1 ± 1e-4 before the first update", ratio_table),
        ("sweep", "Settings tried", sweep_table),
        ("time_to_reward", "Time to reward", reward_table),
    )
    return "\n\n".join(
        f"{title}\n\n{make(results)}" for section, title, make in parts if results.get(section)
    )
