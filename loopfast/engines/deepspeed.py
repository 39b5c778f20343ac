"""DeepSpeed's settings, made from a configuration; checks of what it refuses; its import and start."""

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
from loopfast.engines.deepspeed_file import with_file
from loopfast.errors import ConfigError, MissingExtraError, one_line, short
from loopfast.policies import Policy
from loopfast.system import processor
from loopfast.system.device import torch_device


def deepspeed_settings(
    train: TrainConfig, distributed: DistributedConfig, dtype: str, parameters: int, *, pinned: bool = False
) -> dict[str, Any]:
    """Returns the settings that DeepSpeed is started with, those of the user's own file included.

    Args:
        train, distributed: the sections.
        dtype: ``model.dtype``.
        parameters: the number of the denoiser's parameters; buffers are a share of it.
        pinned: whether offloaded tensors lie in page-locked memory, which makes copies from and to a GPU faster.

    Raises:
        ConfigError: the file of ``distributed.deepspeed`` cannot be read, or contradicts the configuration.
    """
    stage = distributed.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    bucket, live = buffer_sizes(parameters)
    if stage:
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_param_persistence_threshold": 10_000,
        }
    if distributed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if distributed.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # DeepSpeed's default waits for the GPU at every call of the denoiser
        "timers": {"throughput": {"enabled": False}},
    }
    if stage and dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if stage and dtype == "float16":
        # the start and growth of torch's GradScaler
        scale = {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
        settings["fp16"] = {"enabled": True, **scale}
    if stage and (dtype == "float16" or (dtype == "bfloat16" and stage >= 2)):
        # not at stage 1 in bfloat16: the optimizer that DeepSpeed takes for this case fails on a gradient of zero
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings if distributed.deepspeed is None else with_file(settings, train, distributed, dtype)


def buffer_sizes(parameters: int) -> tuple[int, int]:
    """Returns how many weights are sent at a time and how many stay gathered, for a denoiser of this size."""
    return min(max(parameters // 40, 100_000), 50_000_000), min(max(parameters // 20, 1_000_000), 200_000_000)


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
