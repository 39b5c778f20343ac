"""Plots a quantity of several runs against iterations, images or time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Curve", "reward_curves"]

# The palette of Okabe and Ito, which color-blind readers can distinguish. More curves have another line style.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX"
_RULE = "#e4e0d8"


@dataclass(frozen=True)
class Curve:
    """One run's line.

    Attributes:
        label: the run's name.
        x: N values for each axis, by its name.
        y: N values.
    """

    label: str
    x: Mapping[str, Sequence[float]]
    y: Sequence[float]


def reward_curves(curves: Sequence[Curve], axes: Mapping[str, str], title: str, path: Path) -> Path:
    """Draws curves against several axes, side by side, and returns ``path``.

    Args:
        curves: the runs' curves, labeled in a legend below.
        axes: the labels of the horizontal axes by name.
        title: the label of the vertical axis.
        path: the PNG file to write, in a folder that exists.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(len(curves), 3)
    height = 3.4 + 0.24 * -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * len(axes), height), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, (axis, name) in zip(panels, axes.items(), strict=True):
        for index, curve in enumerate(curves):
            panel.plot(
                curve.x[axis],
                curve.y,
                color=_COLORS[index % len(_COLORS)],
                linestyle=_STYLES[index // len(_COLORS) % len(_STYLES)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4,
                linewidth=1.5,
                label=curve.label,
            )
        panel.set_xlabel(name)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        panel.grid(axis="y", color=_RULE, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)
    return path
