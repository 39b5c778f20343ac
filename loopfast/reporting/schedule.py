"""Plots a transition schedule: each step's coefficients and sensitivity, and the trained steps."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopfast.schedules import TransitionSchedule

__all__ = ["schedule_plot"]

_TRAINED, _LEFT_OUT, _OTHER = "#4338ca", "#9a948a", "#c2701c"


def schedule_plot(schedule: TransitionSchedule, trained: Collection[int], path: Path) -> Path:
    """Plots a, b, σ and the sensitivity (b/σ)² of every step, and returns ``path``.

    Args:
        trained: the trained steps, which are shaded.
        path: the file to write; the suffix selects the format (png, svg, pdf).

    Raises:
        ValueError: matplotlib cannot write the format of the suffix.
    """
    from matplotlib.figure import Figure  # takes half a second, and no other report needs it
    from matplotlib.ticker import MaxNLocator

    table = schedule.table64.cpu().numpy()
    sensitivity = schedule.sensitivity.cpu().numpy()
    steps = range(len(table))
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    mean, noise, strength = figure.subplots(3, 1, sharex=True)
    mean.plot(steps, table[:, 0], "o-", color=_TRAINED, label="a, of the sample")
    mean.plot(steps, table[:, 1], "s-", color=_OTHER, label="b, of the model output")
    mean.set_ylabel("a, b")
    mean.legend(frameon=False, ncols=2, loc="best")
    noise.plot(steps, table[:, 2], "o-", color=_TRAINED)
    noise.set_ylabel("σ")
    noise.set_ylim(bottom=0)
    colors = [_TRAINED if step in trained else _LEFT_OUT for step in steps]
    strength.bar(steps, sensitivity, color=colors, width=0.7)
    if (sensitivity > 0).any():
        strength.set_yscale("log")
    strength.set_ylabel("sensitivity (b/σ)²")
    strength.set_xlabel("step (first to last of the sampler)")
    strength.set_xlim(-0.6, len(table) - 0.4)
    strength.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (mean, noise, strength):
        axes.grid(axis="y", color="#e4e0d8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for step in trained:
            axes.axvspan(step - 0.5, step + 0.5, color=_TRAINED, alpha=0.06, linewidth=0)
    figure.suptitle(f"{len(table)} steps, {len(trained)} trained (shaded)", x=0.01, ha="left", weight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
