"""What ``loopfast sample`` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from loopfast.config import Config, ModelConfig, RolloutConfig
from loopfast.console import Display
from loopfast.evaluation.trained import run_config, sampler_of, trained_policy
from loopfast.files import writing
from loopfast.policies import load_policy
from loopfast.rollout import slices
from loopfast.runs import save_image
from loopfast.seeds import row_seeds


def sample_images(
    target: str,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    steps: int | None,
    eta: float | None,
    guidance_scale: float | None,
    output: Path,
    display: Display,
) -> list[Path]:
    """Draws ``count`` images of each prompt and writes them as PNG files.

    Args:
        target: a run's folder, a pipeline's folder, ``embedded``, or a hub name.
        prompts: P texts.
        count: images of each.
        seed: of the noise; the same seed gives the same images.
        steps, eta, guidance_scale: None: as in training; for a model that is not a run's, 50, 0 and 7.5.
        output: the folder to write to.
        display: where progress is shown.

    Returns:
        The files, prompt by prompt.

    Raises:
        ConfigError: there is no such run or model.
        CheckpointError: the run has no checkpoint that can be used.
    """
    folder = Path(target)
    is_run = (folder / "config.yaml").is_file()
    if is_run:
        config = run_config(folder)
    else:
        config = Config(
            model=ModelConfig(pretrained=target, tune="lora"),
            rollout=RolloutConfig(steps=50, guidance_scale=7.5),
        )
    # deterministic sampling is not for training, so the configuration does not allow it
    changes = {
        "steps": steps,
        "eta": eta if is_run or eta is not None else 0.0,
        "guidance_scale": guidance_scale,
    }
    settings = config.rollout.model_copy(
        update={key: value for key, value in changes.items() if value is not None}
    )
    config = config.model_copy(update={"rollout": settings})
    policy = trained_policy(folder, config, display) if is_run else load_policy(config.model)
    sampler = sampler_of(config, policy)

    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    seeds = row_seeds(seed, "sample", 0, list(range(len(prompts))), count)
    owner = torch.arange(len(prompts)).repeat_interleave(count)
    conditioning = policy.encode(list(prompts))
    paths: list[Path] = []
    for rows in slices(len(owner), sampler.microbatch):
        trajectories = sampler.sample(conditioning, owner[rows], seeds[rows])
        for image, index in zip(
            sampler.decode(trajectories.final), range(rows.start, rows.stop), strict=True
        ):
            text = prompts[int(owner[index])]
            name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
            path = output / f"{int(owner[index]):03d}-{name}-{index % count:02d}.png"
            with writing(output):
                save_image(image, path)
            paths.append(path)
        display.message(f"{len(paths)}/{len(owner)} images")
    return paths
