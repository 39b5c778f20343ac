"""The work of the race, and the configurations that make the work of both trainers equal.

Everything here is plain data: neither trainer is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

# TRL's defaults, which both use.
ADAM: Json = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-4}
CLIP_RANGE = 1e-4
LEARNING_RATE = 1e-4
ETA = 1.0
LORA_RANK = 4  # TRL's pipeline allows no other
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
"""Our name of a type, and TRL's ``mixed_precision``."""


@dataclass(frozen=True)
class Work:
    """The content of an iteration.

    Attributes:
        model: ``embedded``, or a name of `benchmarks.race.models`.
        tune: all weights of the UNet, or a LoRA of its attention projections.
        images: sampled in an iteration, `samples` for each prompt.
        steps: the sampler's steps; all are trained on.
        guidance: scale of classifier-free guidance, in sampling and training. TRL trains only with more than 1.
        updates: optimizer steps an iteration, each with the same number of (image, step) pairs.
        reward: its name in ``loopfast.rewards``.
        trl_batches: (sampling, training) batch sizes that are tried for TRL.
        microbatches: (sampling, training) batch sizes that are tried for ours.
        measured: iterations timed in a run, after one to warm up.
        precisions: types in which the ratios before the first update are measured.
    """

    model: str
    tune: Literal["full", "lora"]
    images: int
    steps: int
    guidance: float
    updates: int
    reward: str
    trl_batches: tuple[tuple[int, int], ...]
    microbatches: tuple[tuple[int, int], ...]
    samples: int = 4
    measured: int = 1
    precisions: tuple[str, ...] = ("float32", "bfloat16")

    @property
    def prompts(self) -> int:
        """The number of prompts of an iteration. The race has exactly these prompts, so that every iteration has the
        same.
        """
        return self.images // self.samples


WORKS: dict[str, Work] = {
    "embedded": Work(
        model="embedded",
        tune="full",
        images=128,
        steps=10,
        guidance=3.0,
        updates=4,
        reward="embedded",
        trl_batches=((128, 32), (128, 16), (64, 32), (64, 16), (32, 32)),
        microbatches=((128, 32), (128, 40), (128, 64), (64, 32), (64, 40), (64, 64)),
        measured=3,
    ),
    "sd-full": Work(
        model="sd-small",
        tune="full",
        images=8,
        steps=4,
        guidance=3.0,
        updates=2,
        reward="jpeg_compressibility",
        trl_batches=((8, 4), (8, 2), (4, 4)),
        microbatches=((8, 4), (8, 8)),
        precisions=("float32",),
    ),
    "sd-lora": Work(
        model="sd-small",
        tune="lora",
        images=8,
        steps=4,
        guidance=3.0,
        updates=2,
        reward="jpeg_compressibility",
        trl_batches=((8, 4), (8, 2), (4, 4)),
        microbatches=((8, 4), (8, 8)),
        precisions=("float32",),
    ),
}


def trl_config(
    work: Work, batches: tuple[int, int], *, seed: int = 0, dtype: str = "float32", updates: int | None = None
) -> Json:
    """Returns arguments of TRL's ``DDPOConfig``.

    TRL takes an optimizer step after ``train_gradient_accumulation_steps`` training batches, over all their steps.

    Args:
        work: the content of an iteration.
        batches: images sampled at once, and images (of one step each) trained on at once.
        seed: the run's seed.
        dtype: ``float32`` or ``bfloat16``.
        updates: None uses the work's number.

    Raises:
        ValueError: the batches do not divide the work.
    """
    sampled, trained = batches
    updates = work.updates if updates is None else updates
    if work.images % sampled or work.images % (updates * trained) or sampled % trained:
        raise ValueError(
            f"batches {batches}: {sampled} must divide {work.images} images and be a multiple of {trained}, and "
            f"{trained} must divide the {work.images / updates:g} images of an update"
        )
    return {
        "seed": seed,
        "mixed_precision": PRECISIONS[dtype],
        "sample_num_steps": work.steps,
        "sample_eta": ETA,
        "sample_guidance_scale": work.guidance,
        "sample_batch_size": sampled,
        "sample_num_batches_per_epoch": work.images // sampled,
        "train_batch_size": trained,
        "train_gradient_accumulation_steps": work.images // (updates * trained),
        "train_num_inner_epochs": 1,
        "train_timestep_fraction": 1.0,
        "train_learning_rate": LEARNING_RATE,
        "train_adam_beta1": ADAM["beta1"],
        "train_adam_beta2": ADAM["beta2"],
        "train_adam_weight_decay": ADAM["weight_decay"],
        "train_max_grad_norm": 1.0,
        "train_clip_range": CLIP_RANGE,
        "train_adv_clip_max": 5.0,
    }


def loopfast_config(
    work: Work,
    microbatches: tuple[int, int],
    *,
    model: str,
    prompts: str,
    seed: int = 0,
    dtype: str = "float32",
    updates: int | None = None,
) -> Json:
    """Returns our configuration, as plain data.

    Args:
        work: the content of an iteration.
        microbatches: rows per model call, in sampling and in training.
        model: the pipeline's folder.
        prompts: a text file with as many prompts as an iteration has.
        seed: the run's seed.
        dtype: the model's type.
        updates: None uses the work's number.
    """
    sampled, trained = microbatches
    return {
        "model": {
            "pretrained": model,
            "tune": work.tune,
            "dtype": dtype,
            "lora": {"rank": LORA_RANK, "alpha": LORA_RANK},
        },
        "run": {"seed": seed},
        "prompts": {"source": prompts},
        "reward": [{"name": work.reward}],
        "algorithm": {
            "samples_per_prompt": work.samples,
            "clip_range": CLIP_RANGE,
            "logprob": "mean",
            "advantage": {"clip": 5.0},
        },
        "rollout": {
            "prompts_per_iteration": work.prompts,
            "steps": work.steps,
            "eta": ETA,
            "guidance_scale": work.guidance,
            "microbatch": sampled,
        },
        "train": {
            "updates_per_iteration": work.updates if updates is None else updates,
            "steps": "all",
            "learning_rate": LEARNING_RATE,
            "warmup_updates": 0,
            "max_grad_norm": 1.0,
            "microbatch": trained,
            "on_policy_check": "warn",
            **ADAM,
        },
        # the evaluations before and after the training cannot be switched off; their time is not counted
        "evaluation": {"every": 0, "limit_prompts": 1, "images_per_prompt": 1, "preview_images": 0},
    }


def trl_updates(config: Mapping[str, Any]) -> int:
    """Returns the optimizer steps in an iteration of TRL, from its configuration."""
    images = config["sample_batch_size"] * config["sample_num_batches_per_epoch"]
    of_one = config["train_batch_size"] * config["train_gradient_accumulation_steps"]
    return images // of_one * config["train_num_inner_epochs"]


def trl_pairs(config: Mapping[str, Any]) -> int:
    """Returns the (image, step) pairs in an optimizer step of TRL."""
    steps = int(config["sample_num_steps"] * config["train_timestep_fraction"])
    return config["train_batch_size"] * config["train_gradient_accumulation_steps"] * steps


def loopfast_updates(config: Mapping[str, Any]) -> int:
    """Returns the optimizer steps in an iteration of ours, from a configuration with all its keys."""
    return config["train"]["updates_per_iteration"] * config["train"]["inner_epochs"]


def loopfast_pairs(config: Mapping[str, Any], trained_steps: int) -> float:
    """Returns the (image, step) pairs in an optimizer step of ours."""
    images = config["rollout"]["prompts_per_iteration"] * config["algorithm"]["samples_per_prompt"]
    return images * trained_steps / config["train"]["updates_per_iteration"]


# The race to a reward: each trainer with settings that its users would choose, each with its best one.

REWARD_WORK = WORKS["embedded"]
EVALUATION_GUIDANCE = 3.0
"""TRL cannot train without guidance, so it is measured as it was trained; we are sampled in the same way."""

TRL_SWEEP: dict[str, Json] = {
    "lr 3e-5": {"train_learning_rate": 3e-5},
    "lr 1e-4": {"train_learning_rate": 1e-4},
    "lr 3e-4": {"train_learning_rate": 3e-4},
    "lr 1e-4, half the steps": {"train_learning_rate": 1e-4, "train_timestep_fraction": 0.5},
    "lr 5e-5, clip 1e-3": {"train_learning_rate": 5e-5, "train_clip_range": 1e-3},
    "lr 1e-4, clip 1e-3": {"train_learning_rate": 1e-4, "train_clip_range": 1e-3},
    "lr 2e-4, clip 1e-3": {"train_learning_rate": 2e-4, "train_clip_range": 1e-3},
    "lr 1e-4, statistics per prompt": {"train_learning_rate": 1e-4, "per_prompt_stat_tracking": True},
}
"""What differs from TRL's defaults, beside batch sizes. A clip range of 1e-3 on TRL's mean is our 0.2 on a sum."""

LOOPFAST_SWEEP: dict[str, Json] = {
    "recipe tiny": {"train": {"learning_rate": 7e-5}},
    "lr 1.4e-4": {"train": {"learning_rate": 1.4e-4}},
    "128 images": {"rollout": {"prompts_per_iteration": 32}},
    "trained without guidance": {"rollout": {"guidance_scale": 1.0}},
    "without guidance, lr 1.4e-4": {"rollout": {"guidance_scale": 1.0}, "train": {"learning_rate": 1.4e-4}},
    "without guidance, lr 2.1e-4": {"rollout": {"guidance_scale": 1.0}, "train": {"learning_rate": 2.1e-4}},
    "without guidance, 128 images": {"rollout": {"guidance_scale": 1.0, "prompts_per_iteration": 32}},
    "without guidance, 128 images, lr 1.4e-4": {
        "rollout": {"guidance_scale": 1.0, "prompts_per_iteration": 32},
        "train": {"learning_rate": 1.4e-4},
    },
}
"""What differs from the recipe `tiny` at the evaluation's guidance."""


def trl_rows(config: Mapping[str, Any]) -> float:
    """Returns the rows that the model sees in an iteration of TRL; a row with its gradient counts as three."""
    images = config["sample_batch_size"] * config["sample_num_batches_per_epoch"]
    trained = int(config["sample_num_steps"] * config["train_timestep_fraction"])
    return 2 * images * (config["sample_num_steps"] + 3 * trained * config["train_num_inner_epochs"])


def loopfast_rows(config: Mapping[str, Any], trained_steps: int) -> float:
    """Returns the rows that the model sees in an iteration of ours; a row with its gradient counts as three.

    Args:
        config: a configuration with all its keys.
        trained_steps: the number of steps that ``train.steps`` selects.
    """
    rollout, train = config["rollout"], config["train"]
    images = rollout["prompts_per_iteration"] * config["algorithm"]["samples_per_prompt"]
    rows = images * (1 if rollout["guidance_scale"] == 1 else 2)
    return rows * (rollout["steps"] + 3 * trained_steps * train["inner_epochs"])


def iterations_for(budget: float, rows: float) -> int:
    """Returns the number of iterations of `rows` rows that fit a budget of rows, to the nearest, at least 1."""
    return max(1, round(budget / rows))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Json:
    """Returns `base` with `changes`, section by section."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = (
            merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def best(entries: Sequence[Mapping[str, Any]], key: str, *, largest: bool) -> Mapping[str, Any]:
    """Returns the entry with the best number under `key`; the first of equal ones.

    Raises:
        ValueError: no entry has one.
    """
    known = [entry for entry in entries if entry.get(key) is not None]
    if not known:
        raise ValueError(f"no result has {key!r}")
    return max(known, key=lambda entry: entry[key] if largest else -entry[key])
