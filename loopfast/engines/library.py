"""DeepSpeed itself: how it is imported and started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopfast.config import Config
from loopfast.engines.base import require_same
from loopfast.engines.settings import deepspeed_settings
from loopfast.errors import ConfigError, MissingExtraError
from loopfast.group import Group
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
        reason = " ".join(str(error).split())[:300]
        if "not supported on your device" in reason:
            raise ConfigError(
                f"model.dtype: found {config.model.dtype!r}, allowed: a type that DeepSpeed takes on {policy.device}, "
                f"such as float32 ({reason})"
            ) from error
        if config.distributed.deepspeed is None:
            raise
        raise ConfigError(
            f"distributed.deepspeed: DeepSpeed refuses {config.distributed.deepspeed}: {reason}"
        ) from error
    return engine


def lay_out(module: torch.nn.Module) -> None:
    """Gives every weight the strides of its shape: shards are cut from flat memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous().reshape(-1).view(parameter.shape)


def require_same_everywhere(
    group: Group, tensors: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]
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

    if found := group.on_first(problem):
        raise ValueError(found)
