"""Several runs side by side: tables of their work and their results, and their curves."""

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
from loopfast.run.console import clock
from loopfast.run.tracking import read_metrics
from loopfast.system.files import write_file, writing

AXES: dict[str, str] = {
    "iteration": "iterations",
    "images": "images sampled for training",
    "seconds": "wall-clock seconds",
}
"""The axes that rewards are plotted against: names in ``metrics.jsonl``, with their labels."""


@dataclass(frozen=True)
class RewardSummary:
    """A reward at the first, the last and the best of a run's evaluations, and the iteration of the best."""

    first: float
    last: float
    best: float
    best_iteration: int


@dataclass(frozen=True)
class RunSummary:
    """One run's work and its results.

    Attributes:
        label: a name that differs from the other runs' names.
        folder: the run's folder.
        algorithm: the algorithm's name.
        samples_per_prompt: K.
        iterations, planned: the complete iterations, and all that the run has.
        images: the number of images sampled for training.
        seconds: the wall-clock time, evaluations included.
        rewards: the evaluations by reward: ``reward``, which is the sum, then each part. Empty without evaluations.
        benchmarks: the means by benchmark, category and model, for the benchmarks in the run's folder.
    """

    label: str
    folder: str
    algorithm: str
    samples_per_prompt: int
    iterations: int
    planned: int
    images: int
    seconds: float
    rewards: Mapping[str, RewardSummary]
    benchmarks: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class _Run:
    label: str
    folder: Path
    config: Config
    lines: Sequence[Mapping[str, Any]]

    def evaluations(self, name: str) -> list[Mapping[str, Any]]:
        """The lines that have a metric."""
        return [line for line in self.lines if line.get(name) is not None]

    def metrics(self) -> dict[str, str]:
        """The evaluations' metrics by reward: ``reward``, which is the sum, then each part."""
        parts = {term.title: f"eval_{term.title}" for term in self.config.reward}
        return {
            name: metric
            for name, metric in {"reward": "eval_reward", **parts}.items()
            if self.evaluations(metric)
        }


def compare_runs(folders: Sequence[Path], output: Path | None) -> tuple[list[RunSummary], list[Path]]:
    """Compares runs, finished or not.

    Args:
        folders: the runs' folders.
        output: the folder for ``comparison.json``, ``comparison.md`` and one plot per reward. A reward that only one of
            several runs has is not plotted. None writes nothing.

    Returns:
        A summary of each run, and the written files.

    Raises:
        ConfigError: a folder is not a run's folder, or is given twice.
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
"""A table: its header, and rows of text."""


def _run_cells(summaries: Sequence[RunSummary]) -> _Cells:
    """The table of the runs' work, with a row for each run."""
    rows = []
    for summary in summaries:
        done = str(summary.iterations)
        if summary.iterations != summary.planned:
            done += f" of {summary.planned}"
        k, images = str(summary.samples_per_prompt), str(summary.images)
        seconds = clock(summary.seconds, hours=True)
        rows.append([summary.label, summary.algorithm, k, done, images, seconds])
    return ["run", "algorithm", "K", "iterations", "images", "wall time"], rows


def _reward_cells(summaries: Sequence[RunSummary]) -> _Cells:
    """The table of the runs' rewards, with a row for each run."""
    rewards = list(dict.fromkeys(name for summary in summaries for name in summary.rewards))
    rows = [
        [summary.label, *(_summary_text(summary.rewards.get(name)) for name in rewards)]
        for summary in summaries
    ]
    return ["first → last (best at)", *rewards], rows


def _benchmark_cells(summaries: Sequence[RunSummary], benchmark: str) -> _Cells:
    """The table of one benchmark's means, with a row for each model of each run that was measured."""
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
    """The tables of the runs, their rewards and each benchmark, for a terminal."""
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
        rewards[name] = RewardSummary(lines[0][metric], lines[-1][metric], best[metric], best["iteration"])
    files = sorted(run.folder.glob(f"benchmarks/*/{RESULTS}"))
    return RunSummary(
        label=run.label,
        folder=str(run.folder),
        algorithm=run.config.algorithm.name,
        samples_per_prompt=run.config.algorithm.samples_per_prompt,
        iterations=last.get("iteration", 0),
        planned=run.config.train.iterations,
        images=int(last.get("images") or 0),
        seconds=float(last.get("seconds") or 0.0),
        rewards=rewards,
        benchmarks={file.parent.name: _benchmark(file) for file in files},
    )


def _benchmark(file: Path) -> dict[str, dict[str, float]]:
    """The means by category and model, without the difference."""
    found = read_results(file)
    return {
        category: {model: entry["intervals"][model]["mean"] for model in found["models"]}
        for category, entry in found["categories"].items()
    }


def _plots(runs: Sequence[_Run], output: Path) -> list[Path]:
    """Plots each reward, except those that only one of several runs has."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    files = []
    for name in names:
        having = [run for run in runs if name in run.metrics()]
        if len(having) == 1 < len(runs):
            continue
        curves = []
        for run in having:
            metric = run.metrics()[name]
            lines = run.evaluations(metric)
            x = {axis: [float(line[axis]) for line in lines] for axis in AXES}
            curves.append(Curve(run.label, x, [float(line[metric]) for line in lines]))
        title = "total reward of evaluations" if name == "reward" else f"{name} of evaluations"
        file = output / ("reward.png" if name == "reward" else f"reward-{_file_name(name)}.png")
        files.append(reward_curves(curves, AXES, title, file))
    return files


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    depth = 1
    deepest = max(len(folder.parts) for folder in folders)
    while True:
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels) or depth >= deepest:
            return labels
        depth += 1


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text)


def _summary_text(reward: RewardSummary | None) -> str:
    if reward is None:
        return "-"
    return f"{reward.first:.3f} → {reward.last:.3f} ({reward.best:.3f} at {reward.best_iteration})"
