"""DeepSpeed itself: how it is imported and started."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from loopfast.config import Config
from loopfast.distributed.world import World
from loopfast.engines.base import require_same
from loopfast.engines.deepspeed_config import deepspeed_settings
from loopfast.errors import ConfigError, MissingExtraError, one_line, short
from loopfast.policies import Policy


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set up for a device.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtraError("distributed training", "zero3", error.name) from error
    # on a CPU it would compile collectives of its own, in which the others spin when a process dies
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def require_accepted(settings: Mapping[str, Any], file: str, device: torch.device) -> None:
    """Has DeepSpeed check the settings that a user's file is a part of.

    Raises:
        ConfigError: it refuses them.
        MissingExtraError: it is not installed.
    """
    import_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:  # of any kind: it takes the types of most values on trust
        raise _refused(file, error) from error


def _refused(file: str, error: Exception) -> ConfigError:
    return ConfigError(f"distributed.deepspeed: DeepSpeed refuses {file}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """An error of DeepSpeed in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        return f"{key}: {first['msg']}, found {short(json.dumps(first['input'], default=str))}"
    text = one_line(error, 300)
    return text if isinstance(error, (AssertionError, ValueError)) else f"{type(error).__name__}: {text}"


def initialize(
    module: torch.nn.Module,
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer | None,
    parameters: list[torch.nn.Parameter],
) -> Any:
    """DeepSpeed's engine of a module; of a frozen one without an optimizer."""
    deepspeed = import_deepspeed(policy.device)
    count = sum(parameter.numel() for parameter in policy.denoiser.parameters())
    settings = deepspeed_settings(config, count, pinned=policy.device.type == "cuda")
    if config.distributed.deepspeed is not None:
        require_accepted(settings, config.distributed.deepspeed, policy.device)
    if optimizer is None:
        settings["zero_optimization"].pop("offload_optimizer", None)
    try:
        if config.distributed.zero_stage == 3:
            # here and not in initialize(), which would move the whole model to the device first
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=policy.dtype)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters or None, config=settings
        )
    except (AssertionError, KeyError, ValueError) as error:
        reason = _reason(error)
        if "not supported on your device" in reason:
            raise ConfigError(
                f"model.dtype: found {config.model.dtype!r}, allowed: a type that DeepSpeed takes on {policy.device}, "
                f"such as float32 ({reason})"
            ) from error
        if config.distributed.deepspeed is None:
            raise
        raise _refused(config.distributed.deepspeed, error) from error
    return engine


def lay_out(module: torch.nn.Module) -> None:
    """Gives every weight the strides of its shape: shards are cut from flat memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous().reshape(-1).view(parameter.shape)


def require_same_everywhere(
    world: World, tensors: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]
) -> None:
    """As `require_same`, in every process of what the first has.

    Raises:
        ValueError: the weights are another model's.
    """

    def problem() -> str | None:
        try:
            require_same(tensors["policy"], shapes)
        except ValueError as error:
            return str(error)
        return None

    if found := world.on_main(problem):
        raise ValueError(found)
