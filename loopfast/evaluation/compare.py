"""Several runs side by side: a table of what they did and what came of it, and their curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from loopfast.config import Config
from loopfast.errors import ConfigError
from loopfast.evaluation.benchmark.results import RESULTS, read_results
from loopfast.evaluation.models import run_config
from loopfast.reporting import Curve, reward_curves
from loopfast.reporting.tables import plain_table
from loopfast.run.tracking import read_metrics
from loopfast.system.files import write_file, writing

AXES: dict[str, str] = {
    "iteration": "iterations",
    "images": "images sampled for training",
    "seconds": "wall-clock seconds",
}
"""What a reward is drawn against: names of ``metrics.jsonl`` and what they are called."""


@dataclass(frozen=True)
class Course:
    """A reward over a run's evaluations: at the first, the last and the best, and at which iteration that was."""

    first: float
    last: float
    best: float
    best_iteration: int


@dataclass(frozen=True)
class RunSummary:
    """What one run did and what came of it.

    Attributes:
        label: tells the run from the others.
        folder: where it is.
        algorithm: its name.
        samples_per_prompt: K.
        iterations, planned: done, and to do in all.
        images: sampled for training.
        seconds: on the wall clock, evaluations included.
        rewards: its evaluations by reward: ``reward`` is the sum, then each part; empty without evaluations.
        benchmarks: mean by benchmark, category and model, of those measured in its folder.
    """

    label: str
    folder: str
    algorithm: str
    samples_per_prompt: int
    iterations: int
    planned: int
    images: int
    seconds: float
    rewards: Mapping[str, Course]
    benchmarks: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class _Run:
    label: str
    folder: Path
    config: Config
    lines: Sequence[Mapping[str, Any]]

    def evaluations(self, name: str) -> list[Mapping[str, Any]]:
        """The lines in which a metric is a number."""
        return [line for line in self.lines if line.get(name) is not None]

    def metrics(self) -> dict[str, str]:
        """The evaluations' metrics by what they measure: ``reward`` for the sum, then each part."""
        parts = {term.title: f"eval_{term.title}" for term in self.config.reward}
        return {
            name: metric
            for name, metric in {"reward": "eval_reward", **parts}.items()
            if self.evaluations(metric)
        }


def compare_runs(folders: Sequence[Path], output: Path | None) -> tuple[list[RunSummary], list[Path]]:
    """Compares runs, finished or not.

    Args:
        folders: of the runs.
        output: the folder for ``comparison.json``, ``comparison.md`` and a plot of each reward, of those that only one
            of several runs has none; None: nothing is written.

    Returns:
        A summary of each run, and the files written.

    Raises:
        ConfigError: a folder is not a run's, or is given twice.
        LoopfastError: a file of a run is damaged, or the output cannot be written.
    """
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise ConfigError(f"{folders[index]} is given twice")
    labels = _labels(resolved)
    runs = [
        _Run(label, folder, run_config(folder), read_metrics(folder / "metrics.jsonl"))
        for label, folder in zip(labels, folders, strict=True)
    ]
    summaries = [_summary(run) for run in runs]
    if output is None:
        return summaries, []
    files = [output / "comparison.json", output / "comparison.md"]
    with writing(output):
        write_file(files[0], (json.dumps([asdict(s) for s in summaries], indent=1) + "\n").encode())
        write_file(files[1], as_markdown(summaries).encode())
        files += _plots(runs, output)
    return summaries, files


_Cells = tuple[list[str], list[list[str]]]
"""A table: its head, and rows of text."""


def _run_cells(summaries: Sequence[RunSummary]) -> _Cells:
    """What the runs did, a row each."""
    rows = []
    for summary in summaries:
        done = str(summary.iterations)
        if summary.iterations != summary.planned:
            done += f" of {summary.planned}"
        k = str(summary.samples_per_prompt)
        images, seconds = str(summary.images), _clock(summary.seconds)
        rows.append([summary.label, summary.algorithm, k, done, images, seconds])
    return ["run", "algorithm", "K", "iterations", "images", "wall time"], rows


def _reward_cells(summaries: Sequence[RunSummary]) -> _Cells:
    """The courses of the runs' rewards, a row each."""
    rewards = list(dict.fromkeys(name for summary in summaries for name in summary.rewards))
    rows = [
        [summary.label, *(_course(summary.rewards.get(name)) for name in rewards)] for summary in summaries
    ]
    return ["first → last (best at)", *rewards], rows


def _benchmark_cells(summaries: Sequence[RunSummary], benchmark: str) -> _Cells:
    """The means of one benchmark, a row for each model of each run that was measured on it."""
    measured = [summary for summary in summaries if benchmark in summary.benchmarks]
    categories = list(dict.fromkeys(name for summary in measured for name in summary.benchmarks[benchmark]))
    rows = []
    for summary in measured:
        found = summary.benchmarks[benchmark]
        for model in dict.fromkeys(model for scores in found.values() for model in scores):
            values = (found.get(category, {}).get(model) for category in categories)
            rows.append([f"{summary.label}, {model}", *("-" if v is None else f"{v:.4f}" for v in values)])
    return [benchmark, *categories], rows


def as_rich(summaries: Sequence[RunSummary]) -> list[Table]:
    """The tables for a terminal: of the runs, of their rewards, and of each benchmark."""
    found = []
    for head, rows in _tables(summaries):
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        found.append(table)
    return found


def as_markdown(summaries: Sequence[RunSummary]) -> str:
    """The tables as Markdown."""
    lines = ["# Comparison of runs", ""]
    for head, rows in _tables(summaries):
        lines += [plain_table(head, rows), ""]
    return "\n".join(lines)


def _tables(summaries: Sequence[RunSummary]) -> list[_Cells]:
    benchmarks = dict.fromkeys(name for summary in summaries for name in summary.benchmarks)
    return [
        _run_cells(summaries),
        _reward_cells(summaries),
        *(_benchmark_cells(summaries, name) for name in benchmarks),
    ]


def _summary(run: _Run) -> RunSummary:
    last: Mapping[str, Any] = run.lines[-1] if run.lines else {}
    rewards = {}
    for name, metric in run.metrics().items():
        lines = run.evaluations(metric)
        best = max(lines, key=lambda line: float(line[metric]))
        rewards[name] = Course(lines[0][metric], lines[-1][metric], best[metric], best["iteration"])
    return RunSummary(
        run.label,
        str(run.folder),
        run.config.algorithm.name,
        run.config.algorithm.samples_per_prompt,
        last.get("iteration", 0),
        run.config.train.iterations,
        int(last.get("images") or 0),
        float(last.get("seconds") or 0.0),
        rewards,
        {file.parent.name: _benchmark(file) for file in sorted(run.folder.glob(f"benchmarks/*/{RESULTS}"))},
    )


def _benchmark(file: Path) -> dict[str, dict[str, float]]:
    """Mean by category and model, the difference left out."""
    found = read_results(file)
    return {
        category: {model: entry["intervals"][model]["mean"] for model in found["models"]}
        for category, entry in found["categories"].items()
    }


def _plots(runs: Sequence[_Run], output: Path) -> list[Path]:
    """A plot of each reward: of the sum, and of the parts that all runs, or more than one, have."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    files = []
    for name in names:
        having = [run for run in runs if name in run.metrics()]
        if len(having) == 1 < len(runs):
            continue
        curves = [
            Curve(
                run.label,
                {axis: [float(line[axis]) for line in run.evaluations(run.metrics()[name])] for axis in AXES},
                [float(line[run.metrics()[name]]) for line in run.evaluations(run.metrics()[name])],
            )
            for run in having
        ]
        title = "total reward of evaluations" if name == "reward" else f"{name} of evaluations"
        file = output / ("reward.png" if name == "reward" else f"reward-{_file_name(name)}.png")
        files.append(reward_curves(curves, AXES, title, file))
    return files


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    depth = 1
    deepest = max(len(folder.parts) for folder in folders)
    while True:
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels) or depth >= deepest:
            return labels
        depth += 1


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text)


def _course(course: Course | None) -> str:
    if course is None:
        return "-"
    return f"{course.first:.3f} → {course.last:.3f} ({course.best:.3f} at {course.best_iteration})"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
