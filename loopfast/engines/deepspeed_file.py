"""Reads a user's own file of DeepSpeed settings, and adds it to the configuration's."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loopfast.config import DistributedConfig, TrainConfig
from loopfast.errors import ConfigError, short
from loopfast.system.files import read_settings

# The keys of the first level that DeepSpeed 0.19 reads or names as removed, by the kind of their values.
_SECTION, _NUMBER, _SWITCH, _TEXT = "a section {...}", "a number above 0", "true or false", "text"
_KEYS = {
    _SECTION: """
        activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
        compile compression_training csv_monitor curriculum_learning data_efficiency data_types
        datastates_ckpt eigenvalue elasticity expert_parallel flops_profiler fp16 hybrid_engine
        nebula optimizer pipeline progressive_layer_drop quantize_training scheduler
        sparse_attention tensor_parallel tensorboard timers torch_autocast wandb weight_quantization
        zero_optimization
    """,
    _NUMBER: """
        gradient_accumulation_steps gradient_clipping gradient_predivide_factor
        sequence_parallel_size steps_per_print train_batch_size train_micro_batch_size_per_gpu
        vocabulary_size
    """,
    _SWITCH: """
        dataloader_drop_last disable_allgather disable_python_gc dump_state graph_harvesting
        managed_gradient_accumulation memory_breakdown prescale_gradients sparse_gradients
        use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer
    """,
    _TEXT: """
        communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type
    """,
}
KNOWN = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}
# Sections whose values are names, which may look like numbers.
_NAMES = ("comet", "csv_monitor", "tensorboard", "wandb")
_DEEPEST = 16

_Path = tuple[str, ...]
# Marks an entry of which no fixed value agrees with the configuration.
_NO_VALUE = object()


def _read(file: str) -> dict[str, Any]:
    """Returns the settings in a user's file, in UTF-8 with or without a byte order mark."""
    path = Path(file).expanduser()
    try:
        found = json.loads(
            read_settings(path, "utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_number
        )
    except OSError as error:
        raise ConfigError(f"distributed.deepspeed: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"distributed.deepspeed: {path} is not text in UTF-8 (byte {error.start})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"distributed.deepspeed: {path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"distributed.deepspeed: {path} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ConfigError(f"distributed.deepspeed: {path} holds no object, but {_shown(found)}")
    for where, value in _leaves(found):
        if problem := _problem(where, value):
            raise ConfigError(f"distributed.deepspeed: {path}, {_dotted(where)}: {problem}")
    for key, value in found.items():
        _require_known(path, key, value)
    return found


def with_file(
    ours: dict[str, Any], train: TrainConfig, distributed: DistributedConfig, dtype: str
) -> dict[str, Any]:
    """Returns settings with those of the file that ``distributed.deepspeed`` names.

    An empty section, null and ``auto`` add nothing. An entry that the configuration decides has to agree with it.
    ``ours`` are the settings that the configuration gives.

    Raises:
        ConfigError: the file cannot be read, is not valid JSON, holds keys or values that DeepSpeed does not know, or
            contradicts the configuration.
    """
    file = str(distributed.deepspeed)
    decisions = _decisions(train, distributed, dtype)
    sections = {path[:end] for path in decisions for end in range(1, len(path))}
    held = dict(_leaves(ours))
    result = json.loads(json.dumps(ours))
    for path, value in _leaves(_read(file)):
        if value is None or value == "auto":
            continue
        if path in sections:
            raise _refusal(file, path, value, _SECTION)
        found = held.get(path, _NO_VALUE)
        decided = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in decisions), None)
        if decided is not None:
            keys, same = decisions[decided] if decided == path else (decisions[decided][0], _NO_VALUE)
            if same is _NO_VALUE:
                same = found
            if not (_equal(value, same) or _equal(value, found)):
                allowed = '"auto"' if same is _NO_VALUE else f'{_shown(same)} or "auto"'
                raise _refusal(file, path, value, f"{allowed} with {keys}")
            continue
        target = result
        for part in path[:-1]:
            if not isinstance(target.setdefault(part, {}), dict):
                raise _refusal(file, path, value, f"no section at {part}")
            target = target[part]
        target[path[-1]] = value
    return result


def _decisions(
    train: TrainConfig, distributed: DistributedConfig, dtype: str
) -> dict[_Path, tuple[str, Any]]:
    """Returns the entries that a configuration decides: the keys that do, for an error, and the value that agrees."""
    course = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
    offload, zero = distributed.offload, "zero_optimization"
    # entries without keys are decided by the engine, which supports one value only
    without_value = {
        "train.updates_per_iteration": ("train_batch_size",),
        "train.microbatch": ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        "train.optimizer": ("optimizer", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        "train.lr_schedule": ("scheduler",),
        "model.dtype": ("bf16", "bfloat16", "amp", "torch_autocast", "data_types"),
        "": ("tensor_parallel", "expert_parallel"),
    }
    entries: dict[str, tuple[str, Any]] = {
        **{path: (key, _NO_VALUE) for key, paths in without_value.items() for path in paths},
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "gradient_allreduce_op": ("", "mean"),
        "sequence_parallel_size": ("", 1),
        "optimizer.type": ("train.optimizer", "AdamW" if train.optimizer == "adamw" else _NO_VALUE),
        "optimizer.params.lr": ("train.learning_rate", train.learning_rate),
        "optimizer.params.betas": ("train.beta1 train.beta2", [train.beta1, train.beta2]),
        "optimizer.params.eps": ("train.optimizer", 1e-8),
        "optimizer.params.weight_decay": ("train.weight_decay", train.weight_decay),
        "scheduler.type": ("train.lr_schedule", course[train.lr_schedule]),
        "scheduler.params.warmup_min_lr": ("train.warmup_updates", 0),
        "scheduler.params.warmup_max_lr": ("train.learning_rate", train.learning_rate),
        "scheduler.params.warmup_num_steps": ("train.warmup_updates", train.warmup_updates),
        "scheduler.params.warmup_type": ("train.warmup_updates", "linear"),
        "scheduler.params.total_num_steps": (
            "train.iterations train.updates_per_iteration train.inner_epochs",
            train.iterations * train.updates_per_iteration * train.inner_epochs,
        ),
        "bf16.enabled": ("model.dtype", dtype == "bfloat16"),
        "bfloat16.enabled": ("model.dtype", dtype == "bfloat16"),
        "fp16.enabled": ("model.dtype", dtype == "float16"),
        "fp16.auto_cast": ("model.dtype", False),
        "fp16.fp16_master_weights_and_grads": ("model.dtype", False),
        "amp.enabled": ("model.dtype", False),
        "torch_autocast.enabled": ("model.dtype", False),
        f"{zero}.stage": ("distributed.zero_stage", distributed.zero_stage),
        f"{zero}.offload_param.device": ("distributed.offload", "cpu" if offload == "all" else "none"),
        f"{zero}.offload_optimizer.device": ("distributed.offload", "none" if offload == "none" else "cpu"),
        f"{zero}.cpu_offload": ("distributed.offload", offload != "none"),
        f"{zero}.cpu_offload_param": ("distributed.offload", offload == "all"),
    }
    sections = {"train": dict(train), "distributed": dict(distributed), "model": {"dtype": dtype}}

    def in_words(keys: str) -> str:
        pairs = (key.split(".") for key in keys.split())
        return ", ".join(f"{section}.{name}: {sections[section][name]}" for section, name in pairs)

    return {
        tuple(path.split(".")): (in_words(keys) or "loopfast's engine", same)
        for path, (keys, same) in entries.items()
    }


def _refusal(file: str | Path, path: _Path, value: Any, allowed: str) -> ConfigError:
    return ConfigError(
        f"distributed.deepspeed: {file}, {_dotted(path)}: found {_shown(value)}, allowed: {allowed}"
    )


def _require_known(file: Path, key: str, value: Any) -> None:
    """Checks an entry of the first level."""
    kind = KNOWN.get(key)
    if kind is None:
        nearest = max(KNOWN, key=lambda known: difflib.SequenceMatcher(None, key[:64].lower(), known).ratio())
        raise ConfigError(
            f"distributed.deepspeed: {file}: unknown key {_shown(key)}; nearest known key: {nearest}"
        )
    fits = {
        _SECTION: isinstance(value, dict),
        _NUMBER: isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0,
        _SWITCH: isinstance(value, bool),
        _TEXT: isinstance(value, str),
    }
    if not (fits[kind] or value is None or value == "auto"):
        raise _refusal(file, (key,), value, f'{kind}, null or "auto"')


def _problem(path: _Path, value: Any) -> str | None:
    """Returns what is wrong with a value at any level."""
    if len(path) > _DEEPEST:
        return "nested too deeply"
    if isinstance(value, float) and not math.isfinite(value):
        return "found a number that is too large"
    if isinstance(value, str) and path[0] not in _NAMES and _is_number(value):
        return f"found {_shown(value)}, allowed: a number, without quotes"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON, each of whose keys is given once."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {_shown(key)} is given twice")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _leaves(settings: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yields every value that is not a section. A section that is nested too deeply counts as a value."""
    for key, value in settings.items():
        if isinstance(value, dict) and len(path) < _DEEPEST:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _equal(value: Any, other: Any) -> bool:
    """Returns whether two values agree: true is not 1, and DeepSpeed's names have no case."""
    if isinstance(value, str) and isinstance(other, str):
        return value.lower() == other.lower()
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _dotted(path: _Path) -> str:
    return ".".join(json.dumps(part)[1:-1][:64] for part in path[:_DEEPEST])


def _shown(value: Any) -> str:
    """Returns a value of JSON in one short line."""
    return short(json.dumps(value))
