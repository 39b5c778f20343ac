"""A run's HTML report: one file that needs nothing else, in light and dark.

It is made from what the run has written so far, so it can be made at any time: of a run in progress, of one
that was never evaluated, of one with a single line of metrics. It reads, in the run's folder,
``config.yaml``, ``metrics.jsonl``, ``evaluation/iteration-*.json`` with the sprite sheets beside them, and,
where there is one, ``summary.json``, whose ``facts`` (pairs of name and value) are shown as they are.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from loopfast.errors import LoopfastError, one_line
from loopfast.reporting.charts import Series, line_chart, ticks
from loopfast.reporting.images import data_uri, tiles
from loopfast.run.tracking import describe, read_metrics
from loopfast.system.files import write_file, writing
from loopfast.version import __version__

__all__ = ["write_report"]

_WIDE, _NARROW, _SMALL = (1000, 340), (420, 300), (330, 190)
_FILM_PROMPTS, _FILM_COLUMNS = 6, 6
_SMOOTH_FROM = 20  # iterations; below that a moving average hides more than it shows


class _Diagnostic(NamedTuple):
    metric: str
    title: str
    note: str


_DIAGNOSTICS = (
    _Diagnostic("ratio_max_deviation", "Ratio deviation", "max |ratio − 1| before the first update"),
    _Diagnostic("clip_fraction", "Clip fraction", "share of pairs left without a gradient"),
    _Diagnostic("ratio_outside_clip", "Ratio outside the clip range", "share of pairs, clipped or not"),
    _Diagnostic("kl", "KL from the sampling policy", "estimated from the ratios, in nats"),
    _Diagnostic("kl_reference", "KL from the base model", "mean over transitions, in nats"),
    _Diagnostic("logprob_change", "Log-probability change", "mean absolute, from sampling, in nats"),
    _Diagnostic("grad_norm", "Gradient norm", "before clipping"),
    _Diagnostic("overflows", "Overflows", "of float16 gradients, after which the update was repeated"),
    _Diagnostic("loss", "Loss", "mean over the iteration's updates"),
    _Diagnostic("learning_rate", "Learning rate", "of the last update"),
    _Diagnostic("group_spread", "Spread within a prompt", "of the reward; where it is 0 nothing is learned"),
)
_PHASES = (
    ("seconds_rollout", "Sampling", "phase-1"),
    ("seconds_reward", "Reward", "phase-2"),
    ("seconds_replay", "UpdatePass", "phase-3"),
    ("seconds_optimizer", "Optimizer", "phase-6"),
    ("seconds_eval", "Evaluation", "phase-4"),
    ("seconds_checkpoint", "Checkpoint", "phase-7"),
)
_MEMORY = {
    "peak_memory_bytes": "Peak memory",
    "peak_reserved_bytes": "Peak memory reserved",
    "device_memory_bytes": "Memory taken from the GPU",
}
_SPEEDS = (
    ("images_per_second", "Images a second", "{:.3g} (median, training on them included)"),
    ("outside_model_share", "Outside model calls", "{:.1%} of an iteration (median)"),
)


def write_report(run_directory: Path) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        run_directory: the folder; it holds at least ``config.yaml`` or ``metrics.jsonl``.

    Returns:
        The report's path. One that was there is replaced.

    Raises:
        LoopfastError: the folder is not a run's, a file in it is damaged, or the report cannot be written.
    """
    run = _Run.read(Path(run_directory))
    html = _template().render(
        run=run,
        stats=_stats(run),
        facts=_facts(run),
        reward=_reward_section(run),
        categories=_category_section(run),
        pairs=_pairs(run),
        film=_film(run),
        diagnostics=_diagnostics(run),
        phases=_phases(run),
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = run.directory / "report.html"
    with writing(path):
        write_file(path, html.encode())
    return path


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(score=_score, signed=_signed, duration=_duration)
    return environment.get_template("report.html")


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation of a run, as its JSON file tells it."""

    iteration: int
    images: int
    reward: float
    parts: dict[str, float]
    by_category: dict[str, dict[str, Any]]
    items: list[dict[str, Any]]
    preview: dict[str, Any]
    sheet: Path

    @classmethod
    def read(cls, path: Path) -> _Evaluation:
        data = _mapping(json.loads(path.read_text(encoding="utf-8")))
        return cls(
            data["iteration"],
            data["images"],
            data["reward"],
            data.get("parts", {}),
            data.get("by_category", {}),
            data.get("items", []),
            data.get("preview", {}),
            path.with_suffix(".png"),
        )

    @cached_property
    def tiles(self) -> dict[int, Image.Image]:
        """The preview's tiles by the index of their item; empty where there is no preview that can be read."""
        if not self.preview:
            return {}
        indexes = self.preview["items"]
        try:
            with Image.open(self.sheet) as sheet:
                cut = tiles(sheet, tuple(self.preview["tile"]), self.preview["columns"], len(indexes))
        except OSError:  # missing, or being written at this moment
            return {}
        return {index: tile for index, tile in zip(indexes, cut, strict=False) if index < len(self.items)}


@dataclass(frozen=True)
class _Run:
    directory: Path
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    evaluations: list[_Evaluation]
    summary: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> _Run:
        config_file, metrics_file = directory / "config.yaml", directory / "metrics.jsonl"
        if not config_file.exists() and not metrics_file.exists():
            raise LoopfastError(
                f"{directory} is not the folder of a run: no config.yaml and no metrics.jsonl in it"
            )
        text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
        summary_file = directory / "summary.json"
        file = config_file
        try:
            config = _mapping(yaml.safe_load(text) or {})
            file = summary_file
            summary = _mapping(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
            evaluations = []
            for file in sorted((directory / "evaluation").glob("iteration-*.json")):
                evaluations.append(_Evaluation.read(file))
        except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
            raise LoopfastError(f"{file} is damaged: {one_line(error)}") from error
        return cls(directory, config, text, read_metrics(metrics_file), evaluations, summary)

    def setting(self, section: str, key: str) -> Any:
        return (self.config.get(section) or {}).get(key)

    def column(self, metric: str) -> tuple[list[float], list[float]]:
        """The images so far and the values of a metric, where it was measured."""
        rows = [row for row in self.metrics if row.get(metric) is not None]
        return [float(row.get("images", row["iteration"])) for row in rows], [
            float(row[metric]) for row in rows
        ]

    @property
    def name(self) -> str:
        return str(self.setting("run", "name") or self.directory.name)

    @property
    def iteration(self) -> int:
        return self.metrics[-1]["iteration"] if self.metrics else 0

    @property
    def total(self) -> int | None:
        return self.setting("train", "iterations")

    @property
    def images(self) -> int:
        return int(self.metrics[-1].get("images", 0)) if self.metrics else 0

    @property
    def seconds(self) -> float:
        return float(self.metrics[-1].get("seconds") or 0.0) if self.metrics else 0.0

    @property
    def algorithm(self) -> str:
        return str(self.setting("algorithm", "name") or "").upper()

    @property
    def first_and_last(self) -> tuple[_Evaluation, _Evaluation] | None:
        return (self.evaluations[0], self.evaluations[-1]) if self.evaluations else None


class _Stat(NamedTuple):
    """A number of the header: what it is, its value before and now, and what to say below."""

    label: str
    before: float | None
    after: float
    note: str

    @classmethod
    def of(cls, label: str, values: Sequence[float], note: str) -> _Stat:
        return cls(label, values[0] if len(values) > 1 else None, values[-1], note)


def _stats(run: _Run) -> list[_Stat]:
    stats = []
    _, held_out = run.column("eval_reward")
    _, training = run.column("reward_mean")
    if held_out:
        notes = []
        if run.first_and_last and (error := _paired_error(*run.first_and_last, None)) is not None:
            notes.append(f"± {_score(error)} standard error")
        if max(held_out) > held_out[-1]:
            notes.append(f"highest {_score(max(held_out))}")
        stats.append(_Stat.of("Held-out reward", held_out, " · ".join(notes)))
        for part in _parts(run):
            _, values = run.column(f"eval_{part}")
            if values:
                stats.append(_Stat.of(f"Held-out {part}", values, ""))
    if training:
        note = "first to last iteration"
        if len(training) >= _SMOOTH_FROM:
            training, note = _smooth(training), "moving average"
        stats.append(_Stat.of("Training reward", training, note))
    return stats


def _facts(run: _Run) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []

    def add(name: str, value: Any, text: str = "{}") -> None:
        if value is not None:
            facts.append((name, text.format(value)))

    tune = run.setting("model", "tune")
    if tune == "lora":
        tune = f"LoRA, rank {(run.setting('model', 'lora') or {}).get('rank')}"
    elif tune == "full":
        tune = "all weights of the denoiser"
    add("Model", run.setting("model", "pretrained"))
    add("Trained", tune)
    add("Algorithm", run.algorithm or None)
    add("Samples a prompt", run.setting("algorithm", "samples_per_prompt"), "K = {}")
    add("Prompts", run.setting("prompts", "source"))
    add("Prompts an iteration", run.setting("rollout", "prompts_per_iteration"))
    add("Sampling steps", run.setting("rollout", "steps"))
    add("Learning rate", run.setting("train", "learning_rate"))
    add("Seed", run.setting("run", "seed"))
    if run.images:
        add("Images sampled", run.images, "{:,}")
    for metric, name in _MEMORY.items():
        if memory := [row[metric] for row in run.metrics if row.get(metric)]:
            add(name, max(memory) / 2**20, "{:,.0f} MiB")
    for metric, name, text in _SPEEDS:
        _, values = run.column(metric)
        if values:
            add(name, statistics.median(values), text)
    known = {name.lower() for name, _ in facts}
    for name, value in run.summary.get("facts", []):
        if str(name).lower() not in known:
            add(str(name)[:1].upper() + str(name)[1:], value)
    return facts


class _RewardSection(NamedTuple):
    wide: Markup
    narrow: Markup
    legend: list[tuple[str, str]]
    note: str


def _reward_section(run: _Run) -> _RewardSection | None:
    series, legend, note = [], [], ""
    x, y = run.column("reward_mean")
    if y:
        spread_name = "group_spread" if run.column("group_spread")[1] else "reward_std"
        rows = [row for row in run.metrics if row.get("reward_mean") is not None]
        spread = [float(row.get(spread_name) or 0.0) for row in rows]
        if len(y) >= _SMOOTH_FROM:
            series.append(Series("training, one iteration", x, y, "train", faint=True))
            y, spread = _smooth(y), _smooth(spread)
            legend.append(("train", "training prompts (thin: each iteration; bold: moving average)"))
        else:
            legend.append(("train", "training prompts"))
        series.append(Series("training", x, y, "train", spread))
        what = "the images of one prompt" if spread_name == "group_spread" else "the images of an iteration"
        note = f"The band is one standard deviation among {what}."
    x, y = run.column("eval_reward")
    if y:
        series.append(Series("held-out", x, y, "heldout", marked=True))
        legend.append(("heldout", "held-out prompts"))
    if not series:
        return None

    def chart(size: tuple[int, int]) -> Markup:
        return line_chart(
            series,
            title="Reward over the images sampled",
            x_label="images sampled",
            width=size[0],
            height=size[1],
        )

    return _RewardSection(chart(_WIDE), chart(_NARROW), legend, note)


@dataclass(frozen=True)
class _Category:
    """A row of the table. ``values`` are (before, after), of the reward and then of each part."""

    name: str
    count: int
    values: list[tuple[float | None, float]]
    error: float | None
    dumbbell: Markup


class _CategorySection(NamedTuple):
    parts: list[str]
    rows: list[_Category]
    scale: tuple[float, float]
    before: int
    after: int
    errors: bool


def _category_section(run: _Run) -> _CategorySection | None:
    if run.first_and_last is None:
        return None
    first, last = run.first_and_last
    parts = _parts(run)
    everything = {"reward": last.reward, "parts": last.parts, "count": len(last.items)}
    before = {**first.by_category, "all prompts": {"reward": first.reward, "parts": first.parts}}
    after = dict(last.by_category)
    if len(after) != 1:  # of a single category, the row of all prompts would say the same again
        after["all prompts"] = everything
    rewards = [entry["reward"] for entry in [*after.values(), *before.values()]]
    low, high = _scale(rewards)
    rows = []
    for name, entry in after.items():
        old = before.get(name) if last is not first else None
        values = [(old["reward"] if old else None, entry["reward"])]
        values += [(old["parts"].get(part) if old else None, entry["parts"][part]) for part in parts]
        category = None if entry is everything else name
        error = _paired_error(first, last, category) if old else None
        bar = _dumbbell(values[0][0], values[0][1], low, high)
        rows.append(_Category(name, entry.get("count", 0), values, error, bar))
    has_errors = any(row.error is not None for row in rows)
    return _CategorySection(parts, rows, (low, high), first.iteration, last.iteration, has_errors)


class _Pair(NamedTuple):
    caption: str
    before: str
    after: str
    scores: tuple[float, float]


def _pairs(run: _Run) -> list[_Pair]:
    """The preview's images at the first and the last evaluation, where prompt and seed are the same."""
    if run.first_and_last is None or len(run.evaluations) < 2:
        return []
    first, last = run.first_and_last
    return [
        _Pair(
            last.items[index]["prompt"],
            data_uri(first.tiles[index]),
            data_uri(last.tiles[index]),
            (first.items[index]["reward"], last.items[index]["reward"]),
        )
        for index in last.tiles
        if index in first.tiles and _same(first.items[index], last.items[index])
    ]


class _Film(NamedTuple):
    iterations: list[int]
    rows: list[tuple[str, list[str]]]


def _film(run: _Run) -> _Film | None:
    """A few prompts through the evaluations, when there are more than the two that `_pairs` shows."""
    shown = [one for one in run.evaluations if one.tiles]
    if len(shown) < 3:
        return None
    columns = min(_FILM_COLUMNS, len(shown))
    shown = [shown[round(i * (len(shown) - 1) / (columns - 1))] for i in range(columns)]
    last = shown[-1]
    common = [
        i for i in last.tiles if all(i in one.tiles and _same(one.items[i], last.items[i]) for one in shown)
    ]
    every = max(1, len(common) // _FILM_PROMPTS)
    rows = [
        (last.items[index]["prompt"], [data_uri(one.tiles[index]) for one in shown])
        for index in common[::every][:_FILM_PROMPTS]
    ]
    return _Film([one.iteration for one in shown], rows) if rows else None


class _DiagnosticChart(NamedTuple):
    title: str
    note: str
    last: str
    chart: Markup


def _diagnostics(run: _Run) -> list[_DiagnosticChart]:
    charts = []
    for metric, title, note in _DIAGNOSTICS:
        x, y = run.column(metric)
        if not y:
            continue
        chart = line_chart(
            [Series(describe(metric).description, x, y, "line")],
            title=title,
            x_label="images sampled",
            width=_SMALL[0],
            height=_SMALL[1],
            from_zero=min(y) >= 0,
        )
        last = "0 throughout" if not any(y) else f"{y[-1]:.3g}".replace("-", "−")
        charts.append(_DiagnosticChart(title, note, last, chart))
    return charts


class _Phase(NamedTuple):
    name: str
    color: str
    seconds: float
    share: float
    each: float


def _phases(run: _Run) -> list[_Phase]:
    sums = [(name, color, run.column(metric)[1]) for metric, name, color in _PHASES]
    measured = sum(sum(values) for _, _, values in sums)
    if measured <= 0:
        return []
    whole = max(measured, run.seconds)
    phases = [
        _Phase(name, color, sum(values), sum(values) / whole, sum(values) / len(values))
        for name, color, values in sums
        if values
    ]
    other = whole - measured
    if other > 0.005 * whole:
        phases.append(_Phase("Other", "phase-5", other, other / whole, other / len(run.metrics)))
    return phases


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def _parts(run: _Run) -> list[str]:
    """The single rewards worth a column: all but one that is the total itself."""
    last = run.evaluations[-1] if run.evaluations else None
    if last is None:
        return []
    rows = [{"reward": last.reward, "parts": last.parts}, *last.by_category.values()]
    return [
        part
        for part in last.parts
        if any(not math.isclose(row["reward"], row["parts"].get(part, math.nan)) for row in rows)
    ]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["prompt"] == other["prompt"] and one.get("seed") == other.get("seed")


def _paired_error(first: _Evaluation, last: _Evaluation, category: str | None) -> float | None:
    """Standard error over prompts of the mean change in reward, the same seeds compared.

    Images of one prompt are not independent, so a prompt's mean change counts once. None where the two
    evaluations cannot be paired or there is only one prompt.
    """
    if first is last or len(first.items) != len(last.items):
        return None
    changes: dict[str, list[float]] = defaultdict(list)
    for one, other in zip(first.items, last.items, strict=True):
        if not _same(one, other):
            return None
        if category is None or one.get("category") == category:
            changes[one["prompt"]].append(other["reward"] - one["reward"])
    means = [statistics.fmean(values) for values in changes.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def _smooth(values: Sequence[float]) -> list[float]:
    """Moving average, centered, over about a fifteenth of the values."""
    half = max(1, len(values) // 30)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [statistics.fmean(window) for window in windows]


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a scale for the values: 0 to 1 where they fit, else round numbers."""
    if min(values) >= 0 and max(values) <= 1:
        return 0.0, 1.0
    round_numbers = ticks(min(values), max(values), 4)
    return round_numbers[0], round_numbers[-1]


def _dumbbell(before: float | None, after: float, low: float, high: float) -> Markup:
    """A hollow dot for before, a full one for after, on the table's common scale."""

    def px(value: float) -> float:
        return 6 + (value - low) / (high - low) * 168

    parts = ['<svg class="dumbbell" viewBox="0 0 180 14" width="180" height="14" aria-hidden="true">']
    parts.append('<line class="grid" x1="6" x2="174" y1="7" y2="7"/>')
    if before is not None:
        color = "gain" if after >= before else "loss"
        ends = f'x1="{px(before):.1f}" x2="{px(after):.1f}" y1="7" y2="7"'
        parts.append(f'<line {ends} stroke="var(--{color})" stroke-width="3"/>')
        parts.append(f'<circle class="hollow" cx="{px(before):.1f}" cy="7" r="4"/>')
    parts.append(f'<circle cx="{px(after):.1f}" cy="7" r="4.5" fill="var(--heldout)"/></svg>')
    return Markup("".join(parts))


def _score(value: float) -> str:
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return text.replace("-", "−")


def _signed(value: float) -> str:
    return _score(value) if value < 0 else f"+{_score(value)}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
