"""The model that a run has trained, and how it is sampled."""

from __future__ import annotations

from pathlib import Path

import torch

from loopfast.checkpoints import Checkpoint, CheckpointStore
from loopfast.config import Config, load_config
from loopfast.console import Display
from loopfast.errors import CheckpointError, ConfigError
from loopfast.policies import Policy, load_policy, load_schedule
from loopfast.rollout import Sampler, StepCache, automatic_microbatch


def run_config(folder: Path) -> Config:
    """The configuration of the run in a folder.

    Raises:
        ConfigError: the folder is not a run's.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{str(folder)!r} is not a run's folder: there is no config.yaml in it")
    return load_config(file)


def newest_checkpoint(folder: Path, display: Display) -> Checkpoint:
    """The newest checkpoint of a run that is whole.

    Raises:
        CheckpointError: there is none.
    """
    store = CheckpointStore(folder / "checkpoints", keep=1, keep_best=True)
    checkpoint = store.latest(display.warning)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint that can be used")
    return checkpoint


def trained_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What a run has trained, by name: the moving average where one was kept, as in the run's evaluations."""
    return checkpoint.tensors.get("average") or checkpoint.tensors["policy"]


def policy_of(config: Config, checkpoint: Checkpoint) -> Policy:
    """The policy of a configuration with a checkpoint's weights: their moving average where one was kept.

    Raises:
        ConfigError: the model cannot be loaded.
        CheckpointError: the checkpoint is of another model.
    """
    policy = load_policy(config.model, seed=config.run.seed)
    parameters = policy.trainable()
    saved = trained_weights(checkpoint)
    if saved.keys() != parameters.keys():
        raise CheckpointError(
            f"checkpoint {checkpoint.path} does not hold the weights of {config.model.pretrained!r}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return policy


def trained_policy(folder: Path, config: Config, display: Display) -> Policy:
    """The policy of a run with the weights of its newest good checkpoint.

    Raises:
        ConfigError: the model cannot be loaded.
        CheckpointError: there is no checkpoint that can be used.
    """
    return policy_of(config, newest_checkpoint(folder, display))


def sampler_of(config: Config, policy: Policy) -> Sampler:
    """The sampler of a configuration for a policy, in calls of ``rollout.microbatch`` images.

    Raises:
        ConfigError: the model's scheduler does not allow the sampler's settings.
    """
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
