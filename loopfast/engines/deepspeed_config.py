"""DeepSpeed's settings, made from ours."""

from __future__ import annotations

from typing import Any

from loopfast.config import Config
from loopfast.engines import deepspeed_file


def deepspeed_settings(config: Config, parameters: int, *, pinned: bool = False) -> dict[str, Any]:
    """What DeepSpeed is started with: what a configuration decides, and the further settings of the user's own file.

    Args:
        config: the run.
        parameters: of the denoiser; buffers are a share of it, so that a small model's are small.
        pinned: whether what waits on the host lies in page-locked memory, as copies from and to a GPU want.

    Raises:
        ConfigError: the file of ``distributed.deepspeed`` cannot be read, or contradicts the configuration.
    """
    distributed = config.distributed
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
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # on by default, and it waits for the GPU at every call of the denoiser
        "timers": {"throughput": {"enabled": False}},
    }
    if stage and config.model.dtype != "float32":
        settings |= _mixed_precision(config.model.dtype, stage)
    if distributed.deepspeed is not None:
        theirs = deepspeed_file.read(distributed.deepspeed)
        settings = deepspeed_file.merged(settings, theirs, config, distributed.deepspeed)
    return settings


def buffer_sizes(parameters: int) -> tuple[int, int]:
    """How many numbers are sent at a time, and how many stay gathered, for a denoiser of so many parameters."""
    return _within(parameters // 40, 1e5, 5e7), _within(parameters // 20, 1e6, 2e8)


def _mixed_precision(dtype: str, stage: int) -> dict[str, Any]:
    if dtype == "bfloat16":
        settings: dict[str, Any] = {"bf16": {"enabled": True, "check_grad_overflow": True}}
    else:
        # as torch's GradScaler starts and grows
        scale = {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
        settings = {"fp16": {"enabled": True, **scale}}
    if stage >= 2 or dtype == "float16":
        # DeepSpeed's stage 1 has another optimizer for this in bfloat16, which cannot take a gradient of zero
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _within(value: int, least: float, most: float) -> int:
    return int(min(max(value, least), most))
