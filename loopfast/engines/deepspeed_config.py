"""DeepSpeed's settings, made from a configuration."""

from __future__ import annotations

from typing import Any

from loopfast.config import DistributedConfig, TrainConfig
from loopfast.engines.deepspeed_file import with_file


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
