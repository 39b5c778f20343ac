"""Draws and scores the images of a benchmark, one model after the other. It can be stopped at any time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.evaluation.benchmark.score_file import Scored, ScoreFile
from loopfast.evaluation.draw import draw
from loopfast.prompts import Prompt
from loopfast.rewards import RewardSet, build_rewards
from loopfast.rollout import Sampler
from loopfast.run.console import Display
from loopfast.run.images import save_image
from loopfast.seeds import derive
from loopfast.system.files import writing

# Options of a metric that change its device or its batches, and not its values.
_PLACES = ("device", "batch_size")
_SECONDS_BETWEEN_MESSAGES = 10.0


@dataclass(frozen=True)
class Category:
    """A part of a benchmark: its prompts and the reward that measures them."""

    name: str
    prompts: Sequence[Prompt]
    metric: RewardConfig


@dataclass(frozen=True)
class MeasuredModel:
    """A model that is measured.

    Attributes:
        name: such as ``base`` or ``trained``.
        settings: everything that its images depend on, except prompt and noise, in a form that JSON can hold.
        open: a context that loads the model, provides its sampler, and frees the model.
    """

    name: str
    settings: Mapping[str, Any]
    open: Callable[[], AbstractContextManager[Sampler]]


@dataclass(frozen=True)
class SamplingPlan:
    """The number of images to draw, and the seed of their noise.

    Attributes:
        images_per_prompt: K.
        seed: the seed of the noise and of the bootstrap.
        limit_prompts: the number of prompts of each category, from the first; None stands for all.
        keep_images: the number of images of each prompt to keep as PNG files, at most K.
    """

    images_per_prompt: int
    seed: int = 0
    limit_prompts: int | None = None
    keep_images: int = 0


def image_seed(seed: int, prompt: str, occurrence: int, image: int) -> int:
    """The seed of an image's noise, in [0, 2⁶³).

    It is the same for every model and in every category, and does not depend on the other prompts and images. The
    ``occurrence`` is 0 for the first time that a category has this text, and 1 for the second.
    """
    return derive(seed, "benchmark", prompt, occurrence, image)


def run_benchmark(
    models: Sequence[MeasuredModel],
    categories: Sequence[Category],
    plan: SamplingPlan,
    folder: Path,
    display: Display,
) -> dict[str, dict[str, Tensor]]:
    """Draws and scores the images that the folder has no scores of yet.

    Args:
        models, categories: each with names that differ.
        folder: the folder for scores, ``scores/<model>-<category>.jsonl``, and images,
            ``images/<model>/<category>/samples/<prompt>_<number>.png``, which T2I-CompBench's own programs can read.

    Returns:
        Scores float64 ``[P, K]`` by model and category.

    Raises:
        ConfigError: a metric cannot be built, or the folder holds scores of other settings.
        RewardError: a metric failed. The scores until then are kept.
        LoopfastError: the folder cannot be written.
    """
    for category in categories:
        build_rewards([category.metric], load=False)
    metrics: dict[str, RewardSet] = {}
    tasks = {
        model.name: [_Task(model, category, plan, folder) for category in categories] for model in models
    }
    for model in models:
        pending = [task for task in tasks[model.name] if task.pending()]
        if pending:
            _run_tasks(model, pending, metrics, display)
    return {name: {task.category.name: task.scores() for task in found} for name, found in tasks.items()}


def _run_tasks(
    model: MeasuredModel, tasks: Sequence[_Task], metrics: dict[str, RewardSet], display: Display
) -> None:
    """Runs the tasks of one model and frees it. Metrics that are not in ``metrics`` yet are built and added."""
    with model.open() as sampler:
        for task in tasks:
            metric = task.category.metric
            key = json.dumps([metric.name, metric.options], sort_keys=True, default=str)
            if key not in metrics:
                metrics[key] = build_rewards([metric])
            task.run(sampler, metrics[key], display)


class _Task:
    """The measurement of one model on one category.

    Attributes:
        wanted: every image, as (prompt index, image index).
    """

    def __init__(self, model: MeasuredModel, category: Category, plan: SamplingPlan, folder: Path) -> None:
        self.model, self.category, self.plan, self.folder = model, category, plan, folder
        self.prompts = category.prompts[: plan.limit_prompts]
        self.wanted = [(p, k) for p in range(len(self.prompts)) for k in range(plan.images_per_prompt)]
        metric = category.metric
        settings = {
            "category": category.name,
            "prompts": _digest(category.prompts),
            "metric": {
                "name": metric.name,
                "options": {key: value for key, value in metric.options.items() if key not in _PLACES},
            },
            "seed": plan.seed,
            "model": model.settings,
        }
        self.file = ScoreFile(folder / "scores" / f"{model.name}-{category.name}.jsonl", settings)

    def pending(self) -> list[tuple[int, int]]:
        """The images that have no score yet."""
        return [image for image in self.wanted if image not in self.file.scores]

    def scores(self) -> Tensor:
        values = [self.file.scores[image] for image in self.wanted]
        return torch.tensor(values, dtype=torch.float64).view(-1, self.plan.images_per_prompt)

    def run(self, sampler: Sampler, metric: RewardSet, display: Display) -> None:
        """Draws and scores the pending images, and keeps those that are to be kept."""
        pending = self.pending()
        total = len(self.wanted)
        title = f"{self.model.name}, {self.category.name}"
        if len(pending) < total:
            display.message(f"{title}: {total - len(pending)} of {total} images are scored already")
        prompts = [self.prompts[p] for p, _ in pending]
        texts = [prompt.text for prompt in self.prompts]
        occurrences = [texts[:p].count(text) for p, text in enumerate(texts)]
        numbers = [image_seed(self.plan.seed, texts[p], occurrences[p], k) for p, k in pending]
        seeds = torch.tensor(numbers, dtype=torch.int64)
        announced = time.monotonic()
        for rows, images in draw(sampler, prompts, seeds):
            batch = prompts[rows]
            scores = metric.score(images, [each.text for each in batch], [each.metadata for each in batch])
            for image, (p, k) in zip(images, pending[rows], strict=True):
                if k < self.plan.keep_images:
                    self._keep(image, texts[p], p * self.plan.keep_images + k)
            found = zip(pending[rows], seeds[rows].tolist(), scores.total.tolist(), strict=True)
            self.file.add([Scored(p, k, seed, score) for (p, k), seed, score in found])
            missing = len(pending) - rows.stop
            if missing == 0 or time.monotonic() - announced >= _SECONDS_BETWEEN_MESSAGES:
                announced = time.monotonic()
                display.message(f"{title}: {total - missing}/{total} images")

    def _keep(self, image: Tensor, text: str, number: int) -> None:
        samples = self.folder / "images" / self.model.name / self.category.name / "samples"
        # the benchmark's programs read the prompt before the first "_"; a file name has 255 bytes at most
        name = text.replace("/", " ").replace("_", " ").encode()[:240].decode(errors="ignore")
        with writing(samples):
            samples.mkdir(parents=True, exist_ok=True)
            save_image(image, samples / f"{name}_{number:06d}.png")


def _digest(prompts: Sequence[Prompt]) -> str:
    """A digest of all texts and their metadata, in their order."""
    entries = [[prompt.text, dict(prompt.metadata)] for prompt in prompts]
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()[:16]
