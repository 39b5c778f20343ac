"""Draws a run in one picture: the same prompts and noise before and after training, and the reward over time."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from loopfast.errors import LoopfastError
from loopfast.reporting.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["run_picture"]

_TRAIN, _HELDOUT, _RULE = "#9a948a", "#4338ca", "#e4e0d8"


def run_picture(run_directory: Path, path: Path, *, prompts: int = 8) -> Path:
    """Draws a run for a README, a slide or a paper, and returns ``path``.

    Args:
        run_directory: the run's folder, with at least two evaluations.
        path: the file to write; the suffix selects the format (png, svg, pdf).
        prompts: the largest number of prompts to show.

    Raises:
        LoopfastError: the run has no two evaluations with preview images, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    files = sorted((run_directory / "evaluation").glob("iteration-*.json"))
    if len(files) < 2:
        raise LoopfastError(f"{run_directory} has {len(files)} evaluation(s); the picture needs two")
    run = RunRecord.read(run_directory)
    before, after = run.evaluations[0], run.evaluations[-1]
    shown = [item for item in before.tiles if item in after.tiles][:prompts]
    if not shown:
        raise LoopfastError(f"{run_directory} kept no images of its evaluations (evaluation.preview_images)")

    figure = Figure(figsize=(1.15 * len(shown) + 5.2, 3.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.15 * len(shown), 5.2])[0]
    grid = left.subplots(2, len(shown), squeeze=False, gridspec_kw={"hspace": 0.02, "wspace": 0.04})
    for row, (name, evaluation) in enumerate((("before", before), ("after", after))):
        for axes, item in zip(grid[row], shown, strict=True):
            axes.imshow(evaluation.tiles[item].convert("RGB"), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{evaluation.items[item]['reward']:.2f}", fontsize=8, labelpad=2)
            axes.spines[:].set_color(_RULE)
        grid[row][0].set_ylabel(name, fontsize=10)
    for axes, item in zip(grid[0], shown, strict=True):
        axes.set_title(fill(before.items[item]["prompt"], 15), fontsize=7.5)
    _curves(right.subplots(), run)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise LoopfastError(f"cannot write {path}: {error}") from error
    return path


def _curves(axes: Axes, run: RunRecord) -> None:
    axes.plot(*run.column("reward_mean"), color=_TRAIN, linewidth=1, label="training prompts")
    x, y = run.column("eval_reward")
    axes.plot(x, y, "o-", color=_HELDOUT, label="held-out prompts")
    above: dict[str, Any] = {
        "xytext": (0, 7),
        "textcoords": "offset points",
        "ha": "center",
        "color": _HELDOUT,
    }
    for index in (0, -1):
        axes.annotate(f"{y[index]:.2f}", (x[index], y[index]), **above)
    axes.set(xlabel="images sampled for training", ylabel="reward")
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
