"""Measures a policy's reward on fixed prompts and fixed noise."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from loopfast.config import EvaluationConfig
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.evaluation.draw import draw
from loopfast.prompts import Prompt
from loopfast.reporting import image_grid
from loopfast.rewards import Scores
from loopfast.rollout import Sampler
from loopfast.run.images import tile_sheet, write_image
from loopfast.seeds import row_seeds
from loopfast.system.files import write_file

PREVIEW_COLUMNS = 8


@dataclass(frozen=True)
class Evaluation:
    """The scores of N images, and a few of the images.

    Attributes:
        items: one dict per image, with prompt, category, seed, reward and parts.
        preview: the indices of the items whose images are kept.
        images: the kept images, float32 ``[P, 3, H, W]`` in [0, 1].
        dropped: the number of further images, which have a score that is not finite.
    """

    items: list[dict[str, Any]]
    preview: list[int]
    images: Tensor
    dropped: int = 0

    @property
    def reward(self) -> float:
        """The mean of the total reward."""
        return float(_means(self.items)["reward"])

    @property
    def parts(self) -> dict[str, float]:
        """The mean of each reward by name."""
        return dict(_means(self.items)["parts"])

    def metrics(self, *, dropped: bool) -> dict[str, float]:
        """The evaluation's metrics for an iteration's line; with ``dropped`` also the number of dropped images."""
        found = {"eval_reward": self.reward, **{f"eval_{name}": value for name, value in self.parts.items()}}
        return {**found, "eval_dropped_images": self.dropped} if dropped else found

    def by_category(self) -> dict[str, dict[str, Any]]:
        """The mean reward, the means of the parts and the number of images of each category."""
        categories: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for item in self.items:
            categories[item["category"]].append(item)
        return {name: {**_means(items), "count": len(items)} for name, items in categories.items()}

    def as_dict(self) -> dict[str, Any]:
        """All scores, in a form that JSON can hold."""
        return {**_means(self.items), "by_category": self.by_category(), "items": self.items}

    def save(self, folder: Path, iteration: int, images: int) -> Image.Image | None:
        """Writes ``evaluation/iteration-N.json`` into a run's folder, and pictures of the kept images.

        Args:
            iteration, images: the complete iterations, and the images sampled for training so far.

        Returns:
            The labeled grid in ``images/iteration-N.png``, or None if no images were kept.
        """
        stem = f"iteration-{iteration:06d}"
        record = {"iteration": iteration, "images": images, **self.as_dict()}
        grid = None
        if self.preview:
            tiles = self.images
            columns = min(PREVIEW_COLUMNS, len(tiles))
            height, width = tiles.shape[2:]
            record["preview"] = {"tile": [width, height], "columns": columns, "items": self.preview}
            write_image(tile_sheet(tiles, columns), folder / "evaluation" / f"{stem}.png")
            items = [self.items[index] for index in self.preview]
            grid = image_grid(tiles, [i["prompt"] for i in items], [i["reward"] for i in items], columns)
            write_image(grid, folder / "images" / f"{stem}.png")
        write_file(folder / "evaluation" / f"{stem}.json", json.dumps(record).encode())
        return grid


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    score: Callable[[Tensor, Sequence[Prompt]], Scores],
    config: EvaluationConfig,
    *,
    between: Callable[[], None] = lambda: None,
    world: World = SINGLE_PROCESS,
) -> Evaluation:
    """Draws ``config.images_per_prompt`` images of each prompt and scores them.

    The noise depends on the evaluation's seed, the prompt's index and the image's index alone, so that two models are
    compared on the same noise.

    Args:
        score: returns the rewards of images ``[N, 3, H, W]`` of N prompts. An image with a reward that is not finite is
            dropped.
        between: called before each microbatch; it may raise to stop.
        world: the processes that evaluate together, each a shard of the images. All get the result.
    """
    chosen = list(prompts[: config.limit_prompts])
    samples = config.images_per_prompt
    drawn = [prompt for prompt in chosen for _ in range(samples)]
    seeds = row_seeds(config.seed, "evaluation", 0, list(range(len(chosen))), samples)
    preview = _spread(len(chosen), config.preview_images, samples)
    own = world.shard(len(drawn))
    names: list[str] = []
    values: list[Tensor] = []
    kept: dict[int, Tensor] = {}
    with sampler.ready():
        for rows, images in draw(sampler, drawn, seeds, world=world, between=between):
            scores = score(images, drawn[rows] or drawn[:1])
            names = list(scores.parts)
            if rows.stop > rows.start:
                values.append(torch.stack([scores.total, *scores.parts.values()], 1).double().cpu())
                kept |= {i: images[i - rows.start].cpu() for i in preview if rows.start <= i < rows.stop}
    empty = torch.empty(0, 1 + len(names), dtype=torch.float64)
    rewards = world.gather(torch.cat([empty, *values]), torch.arange(own.start, own.stop), len(drawn))
    items = [
        {
            "prompt": prompt.text,
            "category": str(prompt.metadata.get("category", "all")),
            "seed": seed,
            "reward": row[0],
            "parts": dict(zip(names, row[1:], strict=True)),
        }
        for prompt, seed, row in zip(drawn, seeds.tolist(), rewards.tolist(), strict=True)
    ]
    pictures = _gathered(kept, preview, images, world)
    finite = rewards.isfinite().all(1)
    shown = [number for number, item in enumerate(preview) if finite[item]]
    position = finite.cumsum(0) - 1
    return Evaluation(
        [item for item, counts in zip(items, finite.tolist(), strict=True) if counts],
        [int(position[preview[number]]) for number in shown],
        pictures[shown],
        int((~finite).sum()),
    )


def _gathered(kept: dict[int, Tensor], preview: list[int], images: Tensor, world: World) -> Tensor:
    """Gathers the preview's images from all processes. ``images`` are any images, for their shape."""
    if not preview:
        return torch.empty(0)
    numbers = torch.tensor([preview.index(item) for item in kept], dtype=torch.int64)
    local = torch.stack(list(kept.values())) if kept else images[:0].cpu()
    return world.gather(local, numbers, len(preview))


def _spread(prompts: int, wanted: int, samples: int) -> list[int]:
    """The items of the preview: the first image of prompts that are spread evenly over the list."""
    count = min(prompts, wanted)
    return [prompts * index // count * samples for index in range(count)]


def _means(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean reward of items, and the mean of each part."""
    return {
        "reward": math.fsum(item["reward"] for item in items) / len(items),
        "parts": {
            name: math.fsum(item["parts"][name] for item in items) / len(items) for name in items[0]["parts"]
        },
    }
