"""The comparison of algorithms on the embedded benchmark: ``make study``.

Every method trains on the same number of images with the recipe ``tiny``. A sweep chooses its learning rate, with a
separate seed and separate prompts (``embedded:color-validation``). Then it runs with several seeds and is measured on
the held-out prompts. Runs are parallel, with one thread each, and a study that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from loopfast.config import load_config
from loopfast.errors import LoopfastError
from loopfast.prompts import load_prompts
from loopfast.run.tracking import read_metrics
from loopfast.system.streams import open_streams

RECIPE = "tiny"
SWEEP_SEED = 1000
HELDOUT, VALIDATION = "embedded:color-heldout", "embedded:color-validation"
IMAGES_PER_EVALUATION = 600


@dataclass(frozen=True)
class Method:
    """A row of the table: an algorithm and its K. ``rate_of`` is the method whose learning rate it uses."""

    name: str
    algorithm: str
    samples: int
    rate_of: str | None = None


METHODS: tuple[Method, ...] = (
    Method("LOOP, K = 4", "loop", 4),
    Method("LOOP, K = 2", "loop", 2, rate_of="LOOP, K = 4"),
    Method("LOOP, K = 8", "loop", 8, rate_of="LOOP, K = 4"),
    Method("PPO", "ppo", 4),
    Method("GRPO", "grpo", 4),
    Method("RLOO", "rloo", 4),
    Method("REINFORCE", "reinforce", 4),
)


@dataclass(frozen=True)
class Job:
    """One training run of the study."""

    method: Method
    learning_rate: float
    seed: int
    prompts: str

    @property
    def name(self) -> str:
        """The run's name, which contains everything that distinguishes it from other runs."""
        split = self.prompts.rpartition("-")[2]
        return (
            f"{self.method.algorithm}-k{self.method.samples}-lr{self.learning_rate:g}-{split}-seed{self.seed}"
        )

    def arguments(self, directory: Path, overrides: Sequence[str]) -> list[str]:
        """The arguments after ``python -m loopfast``."""
        recipe = load_config(RECIPE, overrides)
        images = recipe.rollout.prompts_per_iteration * recipe.algorithm.samples_per_prompt
        settings = [
            *overrides,
            f"run.name={self.name}",
            f"run.directory={json.dumps(str(directory))}",
            f"run.seed={self.seed}",
            f"algorithm.name={self.method.algorithm}",
            f"algorithm.samples_per_prompt={self.method.samples}",
            f"rollout.prompts_per_iteration={images // self.method.samples}",
            f"train.learning_rate={self.learning_rate!r}",
            f"evaluation.prompts={self.prompts}",
        ]
        flags = [flag for setting in settings for flag in ("--set", setting)]
        return ["train", "--quiet", "--config", RECIPE, "--resume", "auto", *flags]


@dataclass(frozen=True)
class Result:
    """The measurements of a run: soft and exact held-out score before and after, and the number of training images."""

    method: str
    learning_rate: float
    seed: int
    prompts: str
    images: int
    seconds: float
    base: float
    final: float
    base_exact: float
    final_exact: float
    train_final: float


def run(job: Job, directory: Path, overrides: Sequence[str]) -> Result:
    """Runs or continues a job, and reads its measurements.

    Raises:
        LoopfastError: the run failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "loopfast", *job.arguments(directory, overrides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoopfastError(f"{job.name} failed with exit code {done.returncode}: {done.stderr.strip()}")
    lines = read_metrics(directory / job.name / "metrics.jsonl")
    evaluated = [line for line in lines if "eval_reward" in line]
    first, last = evaluated[0], evaluated[-1]
    recent = [line["reward_mean"] for line in lines[1:][-5:]]
    result = Result(
        job.method.name,
        job.learning_rate,
        job.seed,
        job.prompts,
        last["images"],
        last["seconds"],
        first["eval_reward"],
        last["eval_reward"],
        first["eval_embedded_exact"],
        last["eval_embedded_exact"],
        statistics.fmean(recent),
    )
    print(f"{job.name}: {result.base:.3f} -> {result.final:.3f} in {result.seconds:.0f} s", flush=True)
    return result


def run_all(jobs: Iterable[Job], directory: Path, overrides: Sequence[str], parallel: int) -> list[Result]:
    """Runs all jobs, ``parallel`` at a time, and returns their results in order."""
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda job: run(job, directory, overrides), jobs))


def best_rates(sweep: Sequence[Result]) -> dict[str, float]:
    """Returns each method's learning rate with the highest validation reward."""
    best: dict[str, Result] = {}
    for result in sweep:
        if result.method not in best or result.final > best[result.method].final:
            best[result.method] = result
    return {method: result.learning_rate for method, result in best.items()}


def table(finals: Sequence[Result]) -> str:
    """Returns the results as Markdown: mean and standard deviation over seeds, best method first."""
    groups: dict[str, list[Result]] = {}
    for result in finals:
        groups.setdefault(result.method, []).append(result)
    base = statistics.fmean(result.base for result in finals)
    base_exact = statistics.fmean(result.base_exact for result in finals)
    rows = sorted(groups.items(), key=lambda item: -statistics.fmean(r.final for r in item[1]))
    lines = [
        "| method | learning rate | held-out reward | each seed | held-out exact | training prompts |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {results[0].learning_rate:g} | {_spread([r.final for r in results])} "
            f"| {', '.join(f'{r.final:.3f}' for r in results)} | {_spread([r.final_exact for r in results])} "
            f"| {_spread([r.train_final for r in results])} |"
            for name, results in rows
        ),
        f"| before training | | {base:.3f} | | {base_exact:.3f} | |",
    ]
    return "\n".join(lines) + "\n"


def plot(directory: Path, jobs: Sequence[Job], path: Path) -> None:
    """Plots the held-out reward by images: the mean over seeds and the range between them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for method in METHODS:
        runs = [read_metrics(directory / job.name / "metrics.jsonl") for job in jobs if job.method == method]
        curves = [
            [(line["images"], line["eval_reward"]) for line in r if "eval_reward" in line] for r in runs
        ]
        if not curves:
            continue
        images = [point[0] for point in curves[0]]
        values = list(zip(*([point[1] for point in curve] for curve in curves), strict=True))
        (line,) = axes.plot(images, [statistics.fmean(v) for v in values], label=method.name)
        axes.fill_between(
            images, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.12
        )
    axes.set(xlabel="images sampled for training", ylabel="held-out reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def study(
    output: Path,
    runs: Path,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    parallel: int,
    overrides: Sequence[str],
) -> str:
    """Runs the whole study; writes ``results.json``, ``results.md`` and ``curves.png`` into ``output``.

    Returns:
        The table.
    """
    swept = [method for method in METHODS if method.rate_of is None]
    sweep = run_all(
        [Job(method, rate, SWEEP_SEED, VALIDATION) for rate in rates for method in swept],
        runs,
        [*overrides, *_evaluation(VALIDATION)],
        parallel,
    )
    chosen = best_rates(sweep)
    jobs = [
        Job(method, chosen[method.rate_of or method.name], seed, HELDOUT)
        for seed in seeds
        for method in METHODS
    ]
    finals = run_all(jobs, runs, [*overrides, *_evaluation(HELDOUT)], parallel)

    output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "recipe": load_config(RECIPE, overrides).model_dump(mode="json"),
        "torch": torch.__version__,
        "sweep": [asdict(result) for result in sweep],
        "final": [asdict(result) for result in finals],
    }
    (output / "results.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    text = table(finals)
    (output / "results.md").write_text(text, "utf-8")
    plot(runs, jobs, output / "curves.png")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line of this module."""
    open_streams(keep_going=True)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Compare the algorithms on the embedded benchmark.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/study"), help="folder for table, plot and JSON"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder for the training runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[7e-5, 1.4e-4], help="learning rates to sweep"
    )
    parser.add_argument(
        "--parallel", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    print(
        study(
            options.output,
            options.runs,
            seeds=options.seeds,
            rates=options.rates,
            parallel=options.parallel,
            overrides=options.overrides,
        )
    )


def _evaluation(source: str) -> list[str]:
    """Returns settings with which an evaluation draws about the same number of images with any prompts."""
    each = max(1, round(IMAGES_PER_EVALUATION / len(load_prompts(source))))
    return [f"evaluation.images_per_prompt={each}", "evaluation.preview_images=8"]


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
