"""The sections of a run's report: the numbers and charts that the template lays out."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from loopfast.reporting.charts import Series, line_chart, ticks
from loopfast.reporting.images import data_uri
from loopfast.reporting.records import EvaluationRecord, RunRecord
from loopfast.run.tracking import describe

# width and height of charts in CSS pixels
_WIDE, _NARROW, _SMALL = (1000, 340), (420, 300), (330, 190)
_FILM_PROMPTS, _FILM_COLUMNS = 6, 6
_SMOOTH_FROM = 20  # iterations; with fewer, a moving average hides more than it shows


_DIAGNOSTICS = (
    ("ratio_max_deviation", "Ratio deviation", "max |ratio − 1| before the first update"),
    ("clip_fraction", "Clip fraction", "share of pairs left without a gradient"),
    ("ratio_outside_clip", "Ratio outside the clip range", "share of pairs, clipped or not"),
    ("kl", "KL from the sampling policy", "estimated from the ratios, in nats"),
    ("kl_reference", "KL from the base model", "mean over transitions, in nats"),
    ("logprob_change", "Log-probability change", "mean absolute, from sampling, in nats"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("overflows", "Overflows", "of float16 gradients, after which the update was repeated"),
    ("loss", "Loss", "mean over the iteration's updates"),
    ("learning_rate", "Learning rate", "of the last update"),
    ("group_spread", "Spread within a prompt", "of the reward; where it is 0 nothing is learned"),
)
_PHASES = (
    ("seconds_rollout", "Sampling", "phase-1"),
    ("seconds_reward", "Reward", "phase-2"),
    ("seconds_replay", "Replay", "phase-3"),
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


def stats(run: RunRecord) -> list[dict[str, Any]]:
    """The rewards at the top of the page: their values before and now, and a note below."""
    stats = []

    def add(label: str, values: Sequence[float], note: str) -> None:
        before = values[0] if len(values) > 1 else None
        stats.append({"label": label, "before": before, "after": values[-1], "note": note})

    _, held_out = run.column("eval_reward")
    _, training = run.column("reward_mean")
    if held_out:
        notes = []
        if (error := _paired_error(run.evaluations, None)) is not None:
            notes.append(f"± {format_score(error)} standard error")
        if max(held_out) > held_out[-1]:
            notes.append(f"highest {format_score(max(held_out))}")
        add("Held-out reward", held_out, " · ".join(notes))
        for part in _parts(run):
            _, values = run.column(f"eval_{part}")
            if values:
                add(f"Held-out {part}", values, "")
    if training:
        note = "first to last iteration"
        if len(training) >= _SMOOTH_FROM:
            training, note = _smooth(training), "moving average"
        add("Training reward", training, note)
    return stats


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """The run's settings and measurements, by name."""
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
    add("Images sampled", run.last["images"] or None, "{:,}")
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


def reward(run: RunRecord) -> dict[str, Any] | None:
    """The charts of training's and evaluations' reward, with legend and note; None if the run has neither."""
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
    title = "Reward over the images sampled"
    wide, narrow = (
        line_chart(series, title=title, x_label="images sampled", width=width, height=height)
        for width, height in (_WIDE, _NARROW)
    )
    return {"wide": wide, "narrow": narrow, "legend": legend, "note": note}


def categories(run: RunRecord) -> dict[str, Any] | None:
    """The table of rewards by category at the first and the last evaluation; None without an evaluation.

    The ``scores`` of a row are (before, after) of the reward and then of each part.
    """
    if not run.evaluations:
        return None
    first, last = run.evaluations[0], run.evaluations[-1]
    parts = _parts(run)
    everything = {**last.means, "count": len(last.items)}
    before = {**first.by_category, "all prompts": first.means}
    after = dict(last.by_category)
    if len(after) != 1:  # with a single category, the row of all prompts would repeat it
        after["all prompts"] = everything
    rewards = [entry["reward"] for entry in [*after.values(), *before.values()]]
    low, high = _scale(rewards)
    rows = []
    for name, entry in after.items():
        old = before.get(name) if last is not first else None
        scores = [(old["reward"] if old else None, entry["reward"])]
        scores += [(old["parts"].get(part) if old else None, entry["parts"][part]) for part in parts]
        error = _paired_error(run.evaluations, None if entry is everything else name) if old else None
        bar = _dumbbell(*scores[0], low, high)
        count = entry.get("count", 0)
        rows.append({"name": name, "count": count, "scores": scores, "error": error, "dumbbell": bar})
    return {
        "parts": parts,
        "rows": rows,
        "scale": (low, high),
        "before": first.iteration,
        "after": last.iteration,
        "errors": any(row["error"] is not None for row in rows),
    }


def pairs(run: RunRecord) -> list[dict[str, Any]]:
    """The preview's images of the first and the last evaluation, where prompt and seed are the same."""
    if len(run.evaluations) < 2:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    return [
        {
            "caption": last.items[index]["prompt"],
            "before": data_uri(first.tiles[index]),
            "after": data_uri(last.tiles[index]),
            "scores": (first.items[index]["reward"], last.items[index]["reward"]),
        }
        for index in last.tiles
        if index in first.tiles and _same(first.items[index], last.items[index])
    ]


def film(run: RunRecord) -> dict[str, Any] | None:
    """The images of a few prompts over the evaluations; None with less than three, as `pairs` shows two."""
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
    return {"iterations": [one.iteration for one in shown], "rows": rows} if rows else None


def diagnostics(run: RunRecord) -> list[dict[str, Any]]:
    """A small chart of each of the update's metrics that was measured."""
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
        charts.append({"title": title, "note": note, "last": last, "chart": chart})
    return charts


def phases(run: RunRecord) -> list[dict[str, Any]]:
    """The seconds of each phase of an iteration, and the rest."""
    columns = [(name, color, run.column(metric)[1]) for metric, name, color in _PHASES]
    sums = [(name, color, sum(values), len(values)) for name, color, values in columns if values]
    measured = sum(seconds for _, _, seconds, _ in sums)
    if measured <= 0:
        return []
    total = max(measured, run.last["seconds"] or 0.0)
    if total - measured > 0.005 * total:
        sums.append(("Other", "phase-5", total - measured, len(run.metrics)))
    return [
        {"name": name, "color": color, "seconds": seconds, "share": seconds / total, "each": seconds / times}
        for name, color, seconds, times in sums
    ]


def _parts(run: RunRecord) -> list[str]:
    """The single rewards that have a column: all but one that equals the total."""
    if not run.evaluations:
        return []
    last = run.evaluations[-1]
    rows = [last.means, *last.by_category.values()]
    return [
        part
        for part in last.means["parts"]
        if any(not math.isclose(row["reward"], row["parts"].get(part, math.nan)) for row in rows)
    ]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["prompt"] == other["prompt"] and one.get("seed") == other.get("seed")


def _paired_error(evaluations: Sequence[EvaluationRecord], category: str | None) -> float | None:
    """The standard error over prompts of the mean change in reward from the first to the last, with the same seeds.

    Images of one prompt are not independent, so a prompt's mean change counts once. The error is None where the two
    evaluations cannot be paired or there is only one prompt.
    """
    if len(evaluations) < 2 or len(evaluations[0].items) != len(evaluations[-1].items):
        return None
    changes: dict[str, list[float]] = defaultdict(list)
    for one, other in zip(evaluations[0].items, evaluations[-1].items, strict=True):
        if not _same(one, other):
            return None
        if category is None or one.get("category") == category:
            changes[one["prompt"]].append(other["reward"] - one["reward"])
    means = [statistics.fmean(values) for values in changes.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def _smooth(values: Sequence[float]) -> list[float]:
    """The centered moving average over about a fifteenth of the values."""
    half = max(1, len(values) // 30)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [statistics.fmean(window) for window in windows]


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a scale for the values: 0 and 1 where they fit, else round numbers."""
    if min(values) >= 0 and max(values) <= 1:
        return 0.0, 1.0
    round_numbers = ticks(min(values), max(values), 4)
    return round_numbers[0], round_numbers[-1]


def _dumbbell(before: float | None, after: float, low: float, high: float) -> Markup:
    """Draws a hollow dot for before and a full one for after, on the table's common scale."""

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


def format_score(value: float) -> str:
    """A reward with three decimals, or one from 10 on."""
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return text.replace("-", "−")


def format_change(value: float) -> str:
    """A change of a reward with its sign."""
    return format_score(value) if value < 0 else f"+{format_score(value)}"
