"""Several runs side by side: tables of their work and their results, and their curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

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

    def __str__(self) -> str:
        return f"{self.first:.3f} → {self.last:.3f} ({self.best:.3f} at {self.best_iteration})"


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
    summaries: list[RunSummary] = []
    curves: dict[str, list[Curve]] = {}
    for label, folder in zip(_labels(resolved), folders, strict=True):
        summary, found = _read_run(label, folder)
        summaries.append(summary)
        for name, curve in found.items():
            curves.setdefault(name, []).append(curve)
    if output is None:
        return summaries, []
    files = [output / "comparison.json", output / "comparison.md"]
    with writing(output):
        write_file(files[0], (json.dumps([asdict(s) for s in summaries], indent=1) + "\n").encode())
        write_file(files[1], as_markdown(summaries).encode())
        for name, having in curves.items():
            if len(having) > 1 or len(folders) == 1:
                title = f"{'total reward' if name == 'reward' else name} of evaluations"
                file = output / ("reward.png" if name == "reward" else f"reward-{_file_name(name)}.png")
                files.append(reward_curves(having, AXES, title, file))
    return summaries, files


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


def _tables(summaries: Sequence[RunSummary]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yields the header and the rows of each table: the runs' work, their rewards, and each benchmark's means."""
    rows = []
    for one in summaries:
        done = str(one.iterations) + (f" of {one.planned}" if one.iterations != one.planned else "")
        numbers = (str(one.samples_per_prompt), done, str(one.images), clock(one.seconds, hours=True))
        rows.append([one.label, one.algorithm, *numbers])
    yield ["run", "algorithm", "K", "iterations", "images", "wall time"], rows
    names = list(dict.fromkeys(name for one in summaries for name in one.rewards))
    rows = [[one.label, *(str(one.rewards.get(name, "-")) for name in names)] for one in summaries]
    yield ["first → last (best at)", *names], rows
    for benchmark in dict.fromkeys(name for one in summaries for name in one.benchmarks):
        measured = {one.label: one.benchmarks.get(benchmark, {}) for one in summaries}
        names = list(dict.fromkeys(name for found in measured.values() for name in found))
        rows = []
        for label, found in measured.items():
            for model in dict.fromkeys(model for scores in found.values() for model in scores):
                values = (found.get(name, {}).get(model) for name in names)
                rows.append([f"{label}, {model}", *("-" if v is None else f"{v:.4f}" for v in values)])
        yield [benchmark, *names], rows


def _read_run(label: str, folder: Path) -> tuple[RunSummary, dict[str, Curve]]:
    """Reads a run's summary, and the evaluations of each reward that has any: the sum, then the parts."""
    config, lines = run_config(folder), read_metrics(folder / "metrics.jsonl")
    rewards, curves = {}, {}
    for name in ("reward", *(term.title for term in config.reward)):
        found = [line for line in lines if line.get(f"eval_{name}") is not None]
        if found:
            x = {axis: [float(line.get(axis) or 0) for line in found] for axis in AXES}
            y = [float(line[f"eval_{name}"]) for line in found]
            best = max(range(len(y)), key=y.__getitem__)
            rewards[name] = RewardSummary(y[0], y[-1], y[best], found[best]["iteration"])
            curves[name] = Curve(label, x, y)
    last: Mapping[str, Any] = lines[-1] if lines else {}
    benchmarks = sorted(folder.glob(f"benchmarks/*/{RESULTS}"))
    summary = RunSummary(
        label=label,
        folder=str(folder),
        algorithm=config.algorithm.name,
        samples_per_prompt=config.algorithm.samples_per_prompt,
        iterations=last.get("iteration", 0),
        planned=config.train.iterations,
        images=int(last.get("images") or 0),
        seconds=float(last.get("seconds") or 0.0),
        rewards=rewards,
        benchmarks={file.parent.name: _benchmark(file) for file in benchmarks},
    )
    return summary, curves


def _benchmark(file: Path) -> dict[str, dict[str, float]]:
    """The means by category and model, without the difference."""
    found = read_results(file)
    return {
        category: {model: entry["intervals"][model]["mean"] for model in found["models"]}
        for category, entry in found["categories"].items()
    }


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text)
