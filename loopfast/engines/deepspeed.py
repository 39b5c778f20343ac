"""Checks what DeepSpeed refuses, and imports and starts it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import ValidationError

from loopfast.config import DistributedConfig, TrainConfig
from loopfast.engines.deepspeed_config import deepspeed_settings
from loopfast.errors import ConfigError, MissingExtraError, one_line, short
from loopfast.policies import Policy
from loopfast.system import processor
from loopfast.system.device import torch_device


def require_type(dtype: str, zero_stage: int, device: str) -> None:
    """Checks that DeepSpeed, if it shards the run, takes ``model.dtype`` on this processor.

    Without sharding, float16 is allowed on every processor, as PyTorch emulates it. Of the kinds of ``device``, only
    ``cpu`` is checked.

    Raises:
        ConfigError: DeepSpeed does not take the type.
    """
    if zero_stage > 0 and dtype == "float16" and device == "cpu" and not processor.has_kernels("float16"):
        raise ConfigError(
            "model.dtype: found 'float16', allowed: float32 or bfloat16 with distributed.zero_stage above 0 on this "
            f"processor ({processor.model_name()}): DeepSpeed takes float16 only where oneDNN has kernels for it"
        )


def require_settings(train: TrainConfig, distributed: DistributedConfig, dtype: str, device: str) -> None:
    """Checks the file of ``distributed.deepspeed``, and has DeepSpeed check it if it is installed.

    ``dtype`` and ``device`` are those of the section ``model``.

    Raises:
        ConfigError: the file cannot be read, contradicts the configuration, or is refused by DeepSpeed.
    """
    if distributed.deepspeed is None:
        return
    # the number of parameters decides the buffers' sizes only, which this check does not need
    settings = deepspeed_settings(train, distributed, dtype, 0)
    if find_spec("deepspeed") is not None:
        require_accepted(settings, distributed.deepspeed, torch_device(device))


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed and sets it up for a device.

    Raises:
        MissingExtraError: DeepSpeed is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtraError("distributed training", "zero3", error.name) from error
    # On a CPU, DeepSpeed would compile its own collectives, in which the other processes spin when one dies.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def require_accepted(settings: Mapping[str, Any], file: str, device: torch.device) -> None:
    """Has DeepSpeed check settings that include those of a user's file.

    Raises:
        ConfigError: DeepSpeed refuses them.
        MissingExtraError: DeepSpeed is not installed.
    """
    import_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:  # of any class: DeepSpeed does not check the types of most values
        raise _refused(file, error) from error


def _refused(file: str, error: Exception) -> ConfigError:
    return ConfigError(f"distributed.deepspeed: DeepSpeed refuses {file}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Returns an error of DeepSpeed in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        return f"{key}: {first['msg']}, found {short(json.dumps(first['input'], default=str))}"
    text = one_line(error, 300)
    return text if isinstance(error, (AssertionError, ValueError)) else f"{type(error).__name__}: {text}"


def initialize(
    module: torch.nn.Module,
    policy: Policy,
    train: TrainConfig,
    distributed: DistributedConfig,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Returns DeepSpeed's engine of a module. A frozen module has no optimizer."""
    deepspeed = import_deepspeed(policy.device)
    count = sum(parameter.numel() for parameter in policy.denoiser.parameters())
    dtype, pinned = str(policy.dtype).removeprefix("torch."), policy.device.type == "cuda"
    settings = deepspeed_settings(train, distributed, dtype, count, pinned=pinned)
    if distributed.deepspeed is not None:
        require_accepted(settings, distributed.deepspeed, policy.device)
    parameters = None
    if optimizer is None:
        settings["zero_optimization"].pop("offload_optimizer", None)
    else:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if distributed.zero_stage == 3:
            # not left to initialize(), which would move the whole model to the device first
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=policy.dtype)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters, config=settings
        )
    except (AssertionError, KeyError, ValueError) as error:
        reason = _reason(error)
        if "not supported on your device" in reason:
            raise ConfigError(
                f"model.dtype: found {dtype!r}, allowed: a type that DeepSpeed takes on {policy.device}, "
                f"such as float32 ({reason})"
            ) from error
        if distributed.deepspeed is None:
            raise
        raise _refused(distributed.deepspeed, error) from error
    return engine


def make_contiguous(module: torch.nn.Module) -> None:
    """Makes every weight contiguous, as shards are cut from flat memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous().reshape(-1).view(parameter.shape)
