"""Draws how near the ops come to the memory's speed: ``python profiles/roofline.py RESULTS.json PICTURE.png``.

RESULTS.json is a file of `benchmarks/results`. Every op gets a panel: the share of the device's copy bandwidth over
the least number of bytes that the op has to move. Ops that move no latents are omitted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullFormatter, NullLocator, PercentFormatter

COLORS = {"ours": "#0b6e99", "compile": "#d9730d", "eager": "#8a8a8a", "trl": "#ad1a72"}
LABELS = {"ours": "loopfast", "compile": "torch.compile", "eager": "eager torch", "trl": "TRL"}
STYLES = {"float32": ("-", "full"), "bfloat16": ("--", "none"), "float16": (":", "none")}
COLUMNS = 4


def _lines(settings: dict[str, Any]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Returns points by competitor and dtype; shapes of the same bytes give the mean of their shares."""
    shares: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for setting, competitors in settings.items():
        dtype = setting.rpartition("-")[2]
        for competitor, entry in competitors.items():
            shares[competitor, dtype][entry["bytes"]].append(entry["copy_share"])
    return {
        key: [(size, sum(values) / len(values)) for size, values in sorted(points.items())]
        for key, points in shares.items()
    }


def _panel(axes: Axes, op: str, settings: dict[str, Any]) -> None:
    lines = _lines(settings)
    for (competitor, dtype), points in sorted(lines.items(), key=lambda item: list(COLORS).index(item[0][0])):
        style, fill = STYLES[dtype]
        axes.plot(
            *zip(*points, strict=True),
            color=COLORS[competitor],
            linestyle=style,
            marker="o",
            markersize=4.5,
            fillstyle=fill,
            linewidth=1.4,
            zorder=3 if competitor == "ours" else 2,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(op, fontsize=10, loc="left")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())  # over less than a decade they would overlap
    axes.yaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelbottom=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw(run: dict[str, Any]) -> Figure:
    """Draws the panels of a run.

    Args:
        run: a parsed file of `benchmarks/results`.

    Returns:
        The figure.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    machine = run["machine"]
    results = {op: settings for op, settings in run["results"].items() if op != "leave_one_out"}
    rows = math.ceil(len(results) / COLUMNS)
    figure, grid = plt.subplots(
        rows,
        COLUMNS,
        figsize=(14, 3.1 * rows + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for axes, (op, settings) in zip(panels, sorted(results.items()), strict=False):
        _panel(axes, op, settings)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    figure.supxlabel("fewest bytes to move", fontsize=10)
    figure.supylabel("share of copy bandwidth", fontsize=10)
    present = {competitor for s in results.values() for entries in s.values() for competitor in entries}
    dtypes = {setting.rpartition("-")[2] for settings in results.values() for setting in settings}
    handles = [Line2D([], [], color=COLORS[c], marker="o", label=LABELS[c]) for c in COLORS if c in present]
    handles += [
        Line2D([], [], color="black", linestyle=style, marker="o", fillstyle=fill, label=dtype)
        for dtype, (style, fill) in STYLES.items()
        if dtype in dtypes
    ]
    if len(panels) > len(results):
        panels[-1].legend(handles=handles, loc="center", frameon=False, fontsize=10)
    else:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10
        )
    figure.suptitle(
        f"{machine['device']}, {machine['backend']} backend; 100 % = {machine['copy_gb_per_s']:.4g} GB/s; "
        f"torch {machine['torch']}, {machine['date']}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    run = json.loads(arguments.results.read_text("utf-8"))
    draw(run).savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()
