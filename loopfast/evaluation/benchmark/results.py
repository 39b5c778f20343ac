"""The results of a benchmark: means and their confidence intervals, as JSON and as the paper's table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from loopfast.errors import LoopfastError, one_line
from loopfast.evaluation.benchmark.bootstrap import LEVEL, RESAMPLES, mean_interval
from loopfast.evaluation.benchmark.categories import TITLES
from loopfast.evaluation.benchmark.run import Category, MeasuredModel, SamplingPlan
from loopfast.reporting.tables import plain_table
from loopfast.system.files import write_file, writing
from loopfast.version import __version__

RESULTS = "results.json"
TABLE = "results.md"
DIFFERENCE = "difference"
_PACKAGES = ("torch", "diffusers", "transformers")


def summarize(
    benchmark: str,
    models: Sequence[MeasuredModel],
    categories: Sequence[Category],
    plan: SamplingPlan,
    scores: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Collects the results of a benchmark in a form that JSON can hold.

    Args:
        models: the models. With two models, the second's difference from the first is computed, too.
        scores: float64 ``[P, K]`` by model and category.

    Returns:
        ``benchmark``, ``versions``, ``seed``, ``models`` (their settings), ``confidence``, and ``categories``. Each
        category has its ``metric``, ``intervals`` (mean, low and high of each model and of ``difference``) and
        ``items``: the text of each prompt, and the mean and the image scores of each model.
    """
    found = {}
    for category in categories:
        by_model = {model.name: scores[model.name][category.name] for model in models}
        means = {name: values.mean(1).tolist() for name, values in by_model.items()}
        intervals = dict(means)
        if len(models) == 2:
            first, second = means.values()
            intervals[DIFFERENCE] = [after - before for before, after in zip(first, second, strict=True)]
        items = []
        for index in range(len(means[models[0].name])):
            item: dict[str, Any] = {"prompt": category.prompts[index].text}
            for name, values in by_model.items():
                item[name] = {"mean": means[name][index], "images": values[index].tolist()}
            items.append(item)
        found[category.name] = {
            "metric": {"name": category.metric.name, "options": category.metric.options},
            "prompts": len(items),
            "images_per_prompt": plan.images_per_prompt,
            "intervals": {
                name: mean_interval(values, seed=plan.seed).as_dict() for name, values in intervals.items()
            },
            "items": items,
        }
    return {
        "benchmark": benchmark,
        "versions": {"loopfast": __version__, **{name: metadata.version(name) for name in _PACKAGES}},
        "seed": plan.seed,
        "models": {model.name: dict(model.settings) for model in models},
        "confidence": {"level": LEVEL, "resamples": RESAMPLES, "over": "prompts"},
        "categories": found,
    }


def _titles(result: Mapping[str, Any]) -> list[str]:
    """The table's columns. The paper names T2I-CompBench's."""
    paper = TITLES if result["benchmark"] == "t2i-compbench" else {}
    return [paper.get(name, name) for name in result["categories"]]


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yields the table's rows: the model, and the mean, low and high of each category as text."""
    categories = list(result["categories"].values())
    for name in categories[0]["intervals"]:
        sign = "+" if name == DIFFERENCE else ""
        intervals = [category["intervals"][name] for category in categories]
        yield name, [tuple(f"{i[key]:{sign}.4f}" for key in ("mean", "low", "high")) for i in intervals]


def as_rich(result: Mapping[str, Any]) -> Table:
    """The table for a terminal. Bounds stand below their mean, so that eight categories fit into 80 columns."""
    caption = f"means and {result['confidence']['level']:.0%} confidence intervals"
    table = Table("model", box=SIMPLE_HEAD, padding=0, show_edge=False, caption=caption)
    for title in _titles(result):
        table.add_column(title.replace("-", "-\n"), justify="right")
    for name, numbers in _rows(result):
        table.add_row(f"{name}\n  from\n  to", *("\n".join(values) for values in numbers))
    return table


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table and the metrics of the categories as Markdown."""
    titles = _titles(result)
    # the full name of the difference, for which a terminal has no room
    named = {DIFFERENCE: " − ".join(reversed(list(result["models"])))}
    means = [
        [named.get(name, name), *(f"{mean} [{low}, {high}]" for mean, low, high in numbers)]
        for name, numbers in _rows(result)
    ]
    measured = [
        (title, category["metric"]["name"], str(category["prompts"]), str(category["images_per_prompt"]))
        for title, category in zip(titles, result["categories"].values(), strict=True)
    ]
    confidence = result["confidence"]
    sentence = (
        f"Means over prompts with {confidence['level']:.0%} confidence intervals from {confidence['resamples']} "
        f"bootstrap resamples of the prompts. Seed {result['seed']}."
    )
    parts = [
        f"# {result['benchmark']}",
        plain_table(["model", *titles], means),
        sentence,
        plain_table(["category", "metric", "prompts", "images each"], measured),
    ]
    return "\n\n".join(parts) + "\n"


def write_results(result: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes ``results.json`` and ``results.md`` into a folder, and returns both.

    Raises:
        LoopfastError: the folder cannot be written.
    """
    with writing(folder):
        write_file(folder / RESULTS, (json.dumps(result, indent=1) + "\n").encode())
        write_file(folder / TABLE, as_markdown(result).encode())
    return folder / RESULTS, folder / TABLE


def read_results(file: Path) -> dict[str, Any]:
    """Reads the file that `write_results` wrote.

    Raises:
        LoopfastError: the file is damaged.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
        for category in found["categories"].values():
            for interval in category["intervals"].values():
                float(interval["mean"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoopfastError(f"{file} is damaged: {type(error).__name__}: {one_line(error)}") from None
    return dict(found)
