"""The plots of the page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from profiles import roofline

from .figures import TRAINING, Run, Stages, kept, runs, start

_OURS, _OTHERS, _GREY = "#0b6e99", "#d9730d", "0.35"
_MEMORY = {"plan": _OTHERS, "allocated": "#9cc9dc", "reserved": "#4d9bbd", "taken": _OURS}
_MEMORY_LABELS = {
    "plan": "what `loopfast plan` says",
    "allocated": "in tensors",
    "reserved": "reserved by torch",
    "taken": "taken from the card",
}
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(stages: Stages, folder: Path) -> list[str]:
    """Draws the plots whose figures are known, and removes those whose figures are not known.

    Args:
        stages: lines by stage.
        folder: the folder of the plots.

    Returns:
        Names of the files.
    """
    mpl.use("Agg")
    found = kept(stages)
    trained = [run for stage in TRAINING for run in runs(stages, stage)]
    figures: dict[str, Figure | None] = {
        "roofline.png": None if found is None else roofline.draw(found),
        "levers.png": _levers(
            [run for run in runs(stages, "sd15") if run.last.get("images_per_second")], stages
        ),
        "memory.png": _memory(
            [run for run in trained if "plan" in run.memory and len(run.memory) > 1], stages
        ),
    }
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            figure.savefig(folder / name, dpi=130, metadata={"Software": None})
    return [name for name, figure in figures.items() if figure is not None]


def _levers(found: Sequence[Run], stages: Stages) -> Figure | None:
    """Plots images a second of each configuration at Stable Diffusion 1.5's sizes."""
    if not found:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 0.42 * len(found) + 1.5), layout="constrained")
        axes = figure.subplots()
        speeds = [run.last["images_per_second"] for run in found]
        colors = [_OURS if index == 0 else "#7fb4cc" for index in range(len(found))]
        bars = axes.barh([run.name for run in found], speeds, color=colors)
        axes.bar_label(bars, [f" {speed:.3g}" for speed in speeds])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(speeds))
        axes.set_xlabel("images/s of a whole iteration: sampled, scored and trained on")
        _caption(figure, stages)
    return figure


def _memory(found: Sequence[Run], stages: Stages) -> Figure | None:
    """Plots each configuration's memory at its peak, beside the plan."""
    if not found:
        return None
    kinds = [kind for kind in _MEMORY if any(kind in run.memory for run in found)]
    height = 0.8 / len(kinds)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 0.2 * len(found) * len(kinds) + 1.7), layout="constrained")
        axes = figure.subplots()
        for place, kind in enumerate(kinds):
            sizes: list[Any] = [run.memory.get(kind, 0) / 2**30 for run in found]
            at = [index + (place - (len(kinds) - 1) / 2) * height for index in range(len(found))]
            axes.barh(at, sizes, height, color=_MEMORY[kind], label=_MEMORY_LABELS[kind])
        axes.set_yticks(range(len(found)), [f"{run.stage}: {run.name}" for run in found])
        axes.margins(y=0.02)
        axes.invert_yaxis()
        axes.set_xlabel("GiB at the peak")
        figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=8)
        _caption(figure, stages)
    return figure


def _caption(figure: Figure, stages: Stages) -> None:
    first = start(stages)
    small = "; tiny models: not a measurement of anything" if first.get("small") else ""
    text = f"{first.get('device')}; torch {first.get('torch')}, {first.get('date')}{small}"
    figure.suptitle("\n".join(textwrap.wrap(text, 110)), fontsize=8, color=_GREY, x=0.01, ha="left")
