"""The race as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import PHASES

TRAINERS = {"trl": "TRL", "loopfast": "loopfast"}
COLORS = {"trl": "#c2703d", "loopfast": "#2a6f97"}
PHASE_SHADES = dict(zip(PHASES, (0.65, 0.35, 1.0), strict=True))


def draw(results: Mapping[str, Any], file: Path) -> Path | None:
    """Draws the results as a PNG: bars of seconds and memory, and the curves of the reward.

    Args:
        results: the contents of a file of `benchmarks.race.results`.
        file: the PNG; its date is that of the results.

    Returns:
        The file; None if the results have nothing to draw.
    """
    works = results.get("equal_work", {})
    race = results.get("time_to_reward")
    if not works and race is None:
        return None
    panels = len(works) + bool(works) + (race is not None)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(
            figsize=(2.6 * len(works) + 2.6 * bool(works) + 4.2 * (race is not None), 3.6), dpi=150
        )
        ratios = [1.0] * (panels - (race is not None)) + [1.6] * (race is not None)
        axes = list(figure.subplots(1, panels, squeeze=False, width_ratios=ratios)[0])
        for place, (name, entry) in zip(axes, works.items(), strict=False):
            _seconds(place, name, entry)
        if works:
            _memory(axes[len(works)], works)
        if race is not None:
            _curves(axes[-1], race)
        figure.suptitle(_caption(results), fontsize=8, color="0.35", y=0.99)
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})
    return file


def _caption(results: Mapping[str, Any]) -> str:
    machine, works = results["machine"], results.get("equal_work", {})
    versions = machine.get("versions", {})
    named = [
        f"{label} {versions[trainer][trainer]}" for trainer, label in TRAINERS.items() if trainer in versions
    ]
    if named:
        named.append(f"torch {versions['loopfast']['torch']}")
    dates = [
        part["date"] for part in (*works.values(), results.get("time_to_reward") or {}) if "date" in part
    ]
    threads = [f"{machine['threads']} threads"] if "threads" in machine else []
    return " · ".join([", ".join([machine["device"], *threads]), *named, max(dates, default="")])


def _seconds(place: Axes, name: str, entry: Mapping[str, Any]) -> None:
    """Draws an iteration's seconds by phase; time that belongs to no phase is drawn without a fill."""
    highest = max(entry[trainer]["seconds"] for trainer in TRAINERS)
    for position, trainer in enumerate(TRAINERS):
        figures, bottom = entry[trainer], 0.0
        for phase in PHASES:
            place.bar(position, figures[phase], 0.7, bottom, color=COLORS[trainer], alpha=PHASE_SHADES[phase])
            if figures[phase] > 0.08 * highest:
                color = "white" if PHASE_SHADES[phase] > 0.5 else "black"
                middle = bottom + figures[phase] / 2
                place.text(position, middle, phase, ha="center", va="center", color=color, fontsize=8)
            bottom += figures[phase]
        rest = figures["seconds"] - bottom
        if rest > 0:
            place.bar(position, rest, 0.7, bottom, fill=False, edgecolor=COLORS[trainer])
        top = max(bottom, figures["seconds"])
        place.text(position, top, f"{figures['seconds']:.2f} s", ha="center", va="bottom")
    work = entry["work"]
    place.set_xticks(range(len(TRAINERS)), TRAINERS.values())
    place.set_ylim(0, 1.12 * highest)
    place.set_ylabel("seconds an iteration")
    name, _, changes = name.partition(", ")
    does = changes or f"{work['images']} images, {work['steps']} steps"
    place.set_title(f"{name}: {entry['speedup']:.2f}×\n{does}", fontsize=9)


def _memory(place: Axes, works: Mapping[str, Any]) -> None:
    width = 0.38
    for side, trainer in enumerate(TRAINERS):
        heights = [entry[trainer]["peak_bytes"] / 2**20 for entry in works.values()]
        positions = [index + (side - 0.5) * width for index in range(len(works))]
        bars = place.bar(positions, heights, width, color=COLORS[trainer], label=TRAINERS[trainer])
        place.bar_label(bars, fmt="%.0f", fontsize=7)
    names = [name.replace(", ", "\n") for name in works]
    place.set_xticks(range(len(works)), names, rotation=20 if len(works) > 1 else 0, fontsize=7)
    place.set_ylabel("MiB")
    place.set_title("peak memory\nof the process", fontsize=9)
    place.margins(y=0.3)  # room for the legend above the bars
    place.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)


def _curves(place: Axes, race: Mapping[str, Any]) -> None:
    figures = race["figures"][race["primary"]]
    for trainer, label in TRAINERS.items():
        for curve in figures["curves"][trainer]:
            place.plot(*zip(*curve, strict=True), color=COLORS[trainer], alpha=0.25, linewidth=0.8)
        mean = figures["mean_curves"][trainer]
        place.plot(*zip(*mean, strict=True), color=COLORS[trainer], label=label, linewidth=1.8)
    place.axhline(figures["target"], color="0.5", linewidth=0.8, linestyle=":")
    reached = figures["loopfast_seconds"]
    if reached is not None:
        place.plot(reached, figures["target"], "o", color=COLORS["loopfast"], markersize=5)
    times = "not reached" if reached is None else f"{reached:.0f} s against {figures['trl_seconds']:.0f} s"
    place.set_title(f"time to reward {figures['target']:.3f}\n{times}", fontsize=9)
    place.set_xlabel("seconds of training")
    place.set_ylabel("held-out reward")
    place.legend(frameon=False, fontsize=8, loc="lower right")
