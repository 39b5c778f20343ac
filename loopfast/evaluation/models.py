"""Loads the model that a run has trained, and makes its sampler."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch

from loopfast.config import Config, load_config
from loopfast.errors import CheckpointError, ConfigError
from loopfast.evaluation.exported import lora_config
from loopfast.policies import Policy, is_lora, load_policy, load_schedule, read_prompts
from loopfast.rollout import Sampler, StepCache, automatic_microbatch
from loopfast.run.checkpoints import Checkpoint, CheckpointStore
from loopfast.run.console import Display
from loopfast.system.memory import free_cached_memory


def run_config(folder: Path) -> Config:
    """The configuration of the run in a folder.

    Raises:
        ConfigError: the folder is not a run's folder.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{str(folder)!r} is not a run's folder: there is no config.yaml in it")
    return load_config(file)


def newest_checkpoint(folder: Path, display: Display) -> Checkpoint:
    """The newest checkpoint of a run that is not damaged.

    Raises:
        CheckpointError: the run has no such checkpoint.
    """
    store = CheckpointStore(folder / "checkpoints", keep=1, keep_best=True)
    checkpoint = store.latest(display.warning)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint that can be used")
    return checkpoint


def trained_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The trained weights by name: the moving average if the run kept one, as in the run's evaluations."""
    return checkpoint.tensors.get("average") or checkpoint.tensors["policy"]


def find_trained(
    target: Path, display: Display, *, pretrained: str | None = None, recipe: bool = False
) -> tuple[Config, Checkpoint | None]:
    """Finds a run's configuration and its newest good checkpoint, or the configuration of an exported LoRA.

    Args:
        pretrained: the base model of a LoRA; None stands for the one that its card names.
        recipe: a LoRA must come with the rewards of its run.

    Raises:
        ConfigError: the folder is neither, or a LoRA's base model is not known.
        CheckpointError: the run has no checkpoint that can be used.
    """
    if pretrained is not None or is_lora(target):
        return lora_config(target, pretrained, recipe=recipe), None
    config = run_config(target)
    return config, newest_checkpoint(target, display)


def with_rollout(
    config: Config,
    *,
    steps: float | None = None,
    eta: float | None = None,
    noise_level: float | None = None,
    guidance_scale: float | None = None,
) -> Config:
    """Returns the configuration with other keys of the section ``rollout``. None keeps a key.

    The rules of a configuration file are for training, and do not hold: sampling may be without noise (``eta: 0``), and
    its number of steps need not suit ``train.steps``.
    """
    keys = {"steps": steps, "eta": eta, "noise_level": noise_level, "guidance_scale": guidance_scale}
    changes = {key: value for key, value in keys.items() if value is not None}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=changes)})


def policy_of(config: Config, checkpoint: Checkpoint | None) -> Policy:
    """Loads the policy of a configuration with a checkpoint's weights, or their moving average if the run kept one.

    Without a checkpoint the policy has the weights that ``model.lora.from`` names.

    Raises:
        ConfigError: the model cannot be loaded.
        CheckpointError: the checkpoint belongs to another model.
    """
    policy = load_policy(config.model, seed=config.run.seed, start=checkpoint is None)
    if checkpoint is None:
        return policy
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


def sampler_of(config: Config, policy: Policy) -> Sampler:
    """Makes the sampler of a configuration for a policy, with ``rollout.microbatch`` images per model call.

    Raises:
        ConfigError: the model's scheduler does not allow the sampler's settings.
    """
    schedule = load_schedule(config.model, config.rollout)
    images = config.images_per_iteration
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


def warn_of_cut(sampler: Sampler, prompts: Sequence[str], display: Display) -> None:
    """Warns of prompts that are longer than the model's text encoders read."""
    if warning := read_prompts(sampler.policy.text_limits, prompts).warning:
        display.warning(f"prompts: {warning}")


class RunModels:
    """The samplers of a run's or a LoRA's model before and after training. With an adapter, both share one model."""

    def __init__(self, config: Config, checkpoint: Checkpoint | None) -> None:
        self._config, self._checkpoint = config, checkpoint

    def base(self) -> AbstractContextManager[Sampler]:
        """Context with the sampler of the model before training."""
        if self._config.model.tune == "lora":
            return self._without_adapter()
        return self._loaded(lambda: load_policy(self._config.model))

    def trained(self) -> AbstractContextManager[Sampler]:
        """Context with the sampler of the model after training."""
        if self._config.model.tune == "lora":
            return nullcontext(sampler_of(self._config, self._adapted))
        return self._loaded(lambda: policy_of(self._config, self._checkpoint))

    @cached_property
    def _adapted(self) -> Policy:
        return policy_of(self._config, self._checkpoint)

    @contextmanager
    def _without_adapter(self) -> Iterator[Sampler]:
        with self._adapted.reference():
            yield sampler_of(self._config, self._adapted)

    @contextmanager
    def _loaded(self, load: Callable[[], Policy]) -> Iterator[Sampler]:
        """Context with the sampler of a model that is loaded on entry, and freed on exit to make room for the next."""
        sampler = sampler_of(self._config, load())
        try:
            yield sampler
        finally:
            sampler.release()
            del sampler
            gc.collect()
            free_cached_memory()
