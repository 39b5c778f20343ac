"""DeepSpeed's settings, made from ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loopfast.config import Config
from loopfast.errors import ConfigError

# What of a configuration decides an entry: one that a user's file sets otherwise contradicts it.
_DECIDED_BY = {
    "train_batch_size": "train.updates_per_iteration, which cuts an iteration's pairs into updates",
    "train_micro_batch_size_per_gpu": "train.microbatch",
    "gradient_accumulation_steps": "train.microbatch, of which an update takes as many as it needs",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer, learning_rate, beta1, beta2 and weight_decay",
    "scheduler": "train.lr_schedule and warmup_updates",
    "bf16": "model.dtype",
    "fp16.enabled": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "zero_optimization.stage": "distributed.zero_stage",
    "zero_optimization.offload_param": "distributed.offload",
    "zero_optimization.offload_optimizer": "distributed.offload",
    "zero_allow_untested_optimizer": "train.optimizer",
    "zero_force_ds_cpu_optimizer": "train.optimizer",
}


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
        settings = _merged(settings, _read(Path(distributed.deepspeed).expanduser()), distributed.deepspeed)
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


def _read(path: Path) -> dict[str, Any]:
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"distributed.deepspeed: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"distributed.deepspeed: {path} is not valid JSON: {error}") from error
    if not isinstance(theirs, dict):
        raise ConfigError(f"distributed.deepspeed: {path} holds no object, but {json.dumps(theirs)[:60]}")
    return theirs


def _merged(ours: dict[str, Any], theirs: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Ours with what theirs adds; ``auto`` and the same value are no contradiction."""
    result = json.loads(json.dumps(ours))
    for path, value in _leaves(theirs):
        if value == "auto":
            continue
        key, reason = _decided(path)
        present, found = _lookup(ours, path)
        if reason is not None and not (present and found == value):
            mine = json.dumps(_lookup(ours, key)[1])
            raise ConfigError(
                f"distributed.deepspeed: {file} sets {'.'.join(path)} to {json.dumps(value)}, which {reason} decides "
                f"({mine if _lookup(ours, key)[0] else 'not set'}); take it out of the file"
            )
        target = result
        for part in path[:-1]:
            target = target.setdefault(part, {})
        target[path[-1]] = value
    return result


def _decided(path: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """The part of a path that a key of ours decides, and which key."""
    for length in range(len(path), 0, -1):
        reason = _DECIDED_BY.get(".".join(path[:length]))
        if reason is not None:
            return path[:length], reason
    return path, None


def _leaves(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _lookup(settings: Any, path: tuple[str, ...]) -> tuple[bool, Any]:
    for part in path:
        if not isinstance(settings, dict) or part not in settings:
            return False, None
        settings = settings[part]
    return True, settings
