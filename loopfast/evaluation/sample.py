"""The command ``loopfast sample``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from loopfast.evaluation.exported import plain_config
from loopfast.evaluation.models import RunModels, find_trained, sampler_of, warn_of_cut, with_rollout
from loopfast.policies import is_lora, load_policy
from loopfast.reporting import image_grid
from loopfast.rollout import Sampler, slices
from loopfast.run.console import Display
from loopfast.run.images import save_image
from loopfast.seeds import row_seeds
from loopfast.system.files import writing

GRID_PROMPTS = 16
"""The largest number of prompts in the grid."""


def sample_images(
    target: str,
    prompts: Sequence[str],
    *,
    pretrained: str | None = None,
    count: int,
    seed: int,
    base: bool,
    output: Path,
    display: Display,
    **rollout: float | None,
) -> list[Path]:
    """Draws ``count`` images of each prompt and writes them as PNG files.

    Args:
        target: a run's folder, an exported LoRA's, a pipeline's, ``embedded``, or a hub name.
        pretrained: the base model of a LoRA; None stands for the one that its card names.
        seed: the seed of the noise; the same seed gives the same images.
        base: for a run or a LoRA, draw with the base model, too, from the same noise, and show both in a grid.
        rollout: keys of the section ``rollout``. None stands for the run's setting, and for a model without a run for
            50 deterministic steps with a guidance scale of 7.5.

    Returns:
        The files, prompt by prompt, then ``grid.png`` if it was drawn.

    Raises:
        ConfigError: there is no such run or model, or it has no such setting.
        CheckpointError: the run has no checkpoint that can be used.
    """
    folder = Path(target)
    is_pipeline = pretrained is None and not is_lora(folder) and not (folder / "config.yaml").is_file()
    if is_pipeline:
        config, checkpoint = plain_config(target), None
    else:
        config, checkpoint = find_trained(folder, display, pretrained=pretrained)
    config = with_rollout(config, **rollout)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    models = RunModels(config, checkpoint)
    plain = nullcontext(sampler_of(config, load_policy(config.model))) if is_pipeline else None
    with plain or models.trained() as sampler:
        warn_of_cut(sampler, prompts, display)
        trained = _draw(sampler, prompts, count, seed, display)
    paths = _write(trained, prompts, count, output)
    if base and not is_pipeline:
        display.message("the same with the model before training")
        shown = list(prompts[:GRID_PROMPTS])
        with models.base() as sampler:
            before = _draw(sampler, shown, count, seed, display)
        paths.append(output / "grid.png")
        with writing(output):
            _grid(before, trained[: len(before)], shown, count, paths[-1])
    return paths


def _draw(sampler: Sampler, prompts: Sequence[str], count: int, seed: int, display: Display) -> Tensor:
    """Draws images ``[P · count, 3, H, W]``, prompt by prompt. They depend on the seed and the prompt's index."""
    seeds = row_seeds(seed, "sample", 0, list(range(len(prompts))), count)
    prompt_index = torch.arange(len(prompts)).repeat_interleave(count)
    conditioning = sampler.policy.encode(list(prompts))
    images: list[Tensor] = []
    for rows in slices(len(prompt_index), sampler.microbatch):
        trajectories = sampler.sample(conditioning, prompt_index[rows], seeds[rows])
        images.append(sampler.decode(trajectories.final).cpu())
        display.message(f"{rows.stop}/{len(prompt_index)} images")
    return torch.cat(images)


def _write(images: Tensor, prompts: Sequence[str], count: int, output: Path) -> list[Path]:
    paths = []
    for index, image in enumerate(images):
        position, number = divmod(index, count)
        name = re.sub(r"[^a-z0-9]+", "-", prompts[position].lower()).strip("-")[:60] or "prompt"
        paths.append(output / f"{position:03d}-{name}-{number:02d}.png")
        with writing(output):
            save_image(image, paths[-1])
    return paths


def _grid(before: Tensor, after: Tensor, prompts: Sequence[str], count: int, path: Path) -> None:
    """Writes two rows per prompt, the base model's above the trained model's, with the same noise in each column."""
    shape = (len(prompts), count, *before.shape[1:])
    both = torch.stack([before.view(shape), after.view(shape)], 1).flatten(0, 2)
    captions = [
        f"{name}: {prompt}" for prompt in prompts for name in ("base", "trained") for _ in range(count)
    ]
    image_grid(both, captions, None, count).save(path)
