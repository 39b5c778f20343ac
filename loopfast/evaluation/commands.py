"""What ``loopfast eval`` and ``loopfast sample`` do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.checkpoints import CheckpointStore
from loopfast.config import Config, ModelConfig, RolloutConfig, load_config
from loopfast.console import Display
from loopfast.errors import CheckpointError, ConfigError
from loopfast.evaluation.evaluate import evaluate
from loopfast.files import writing
from loopfast.policies import Policy, load_policy, load_schedule
from loopfast.prompts import Prompt, load_prompts
from loopfast.rewards import Scores, build_rewards
from loopfast.rollout import Sampler, StepCache, automatic_microbatch, slices
from loopfast.runs import save_image
from loopfast.seeds import row_seeds


def evaluate_checkpoint(
    target: Path,
    *,
    prompts: str | None,
    images_per_prompt: int | None,
    seed: int,
    output: Path | None,
    display: Display,
) -> dict[str, Any]:
    """Measures the newest good checkpoint of a run with the run's own rewards and sampler.

    Args:
        target: the run's folder.
        prompts: their source; None: those of the run's evaluations.
        images_per_prompt: None: as in the run's evaluations.
        seed: of the noise.
        output: where to write the result as JSON, if anywhere.
        display: where progress is shown.

    Returns:
        ``reward``, ``parts``, ``by_category`` and ``items``, as in a run's ``evaluation/*.json``.

    Raises:
        ConfigError: the folder is not a run's.
        CheckpointError: the run has no checkpoint that can be used.
        RewardError: a reward failed.
    """
    config = _run_config(target)
    source = load_prompts(prompts or config.evaluation.prompts or config.prompts.source)
    rewards = build_rewards(config.reward)
    sampler = _sampler(config, _trained_policy(target, config, display))
    changes = {
        "seed": seed,
        "limit_prompts": None if prompts else config.evaluation.limit_prompts,
        "preview_images": 0,
    }
    if images_per_prompt is not None:
        changes["images_per_prompt"] = images_per_prompt
    settings = config.evaluation.model_copy(update=changes)

    def score(images: Tensor, batch: Sequence[Prompt]) -> Scores:
        return rewards.score(images, [p.text for p in batch], [p.metadata for p in batch])

    result = evaluate(sampler, source, score, settings).as_dict()
    if output is not None:
        with writing(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1), encoding="utf-8")
        display.message(f"scores of {len(result['items'])} images written to {output}")
    return result


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
        config = _run_config(folder)
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
    policy = _trained_policy(folder, config, display) if is_run else load_policy(config.model)
    sampler = _sampler(config, policy)

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


def _run_config(folder: Path) -> Config:
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{str(folder)!r} is not a run's folder: there is no config.yaml in it")
    return load_config(file)


def _trained_policy(folder: Path, config: Config, display: Display) -> Policy:
    store = CheckpointStore(folder / "checkpoints", keep=1, keep_best=True)
    checkpoint = store.latest(display.warning)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint that can be used")
    policy = load_policy(config.model, seed=config.run.seed)
    parameters = policy.trainable()
    saved = checkpoint.tensors["policy"]
    if saved.keys() != parameters.keys():
        raise CheckpointError(
            f"checkpoint {checkpoint.path} does not hold the weights of {config.model.pretrained!r}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return policy


def _sampler(config: Config, policy: Policy) -> Sampler:
    schedule = load_schedule(config.model, config.rollout)
    images = config.rollout.prompts_per_iteration * config.algorithm.samples_per_prompt
    microbatch = config.rollout.microbatch
    if microbatch == "auto":
        microbatch = automatic_microbatch(images, policy.latent_shape)
    return Sampler(
        policy,
        schedule.to(policy.device),
        config.rollout.guidance_scale,
        config.algorithm.logprob,
        microbatch,
        steps=StepCache(capture=config.rollout.cuda_graph),
    )
