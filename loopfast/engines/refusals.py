"""Checks of what DeepSpeed refuses, made before it is started."""

from __future__ import annotations

from importlib.util import find_spec

from loopfast.config import DistributedConfig, TrainConfig
from loopfast.engines.deepspeed_config import deepspeed_settings
from loopfast.errors import ConfigError
from loopfast.system import processor
from loopfast.system.device import torch_device


def require_type(dtype: str, zero_stage: int, device: str) -> None:
    """Checks that DeepSpeed, if it shards the run, takes ``model.dtype`` on this processor.

    Without sharding, float16 is allowed on every processor, as PyTorch emulates it.

    Args:
        dtype: ``model.dtype``.
        zero_stage: ``distributed.zero_stage``.
        device: the kind of the model's device. Only ``cpu`` is checked.

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

    Args:
        train, distributed: the sections.
        dtype: ``model.dtype``.
        device: the kind of the model's device, or ``auto``.

    Raises:
        ConfigError: the file cannot be read, contradicts the configuration, or is refused by DeepSpeed.
    """
    if distributed.deepspeed is None:
        return
    # the number of parameters decides the buffers' sizes only, which this check does not need
    settings = deepspeed_settings(train, distributed, dtype, 0)
    if find_spec("deepspeed") is not None:
        from loopfast.engines.deepspeed import require_accepted

        require_accepted(settings, distributed.deepspeed, torch_device(device))
