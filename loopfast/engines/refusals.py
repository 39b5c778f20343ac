"""What DeepSpeed refuses, said before it is started."""

from __future__ import annotations

from importlib.util import find_spec

from loopfast.config import Config
from loopfast.engines.deepspeed_config import deepspeed_settings
from loopfast.errors import ConfigError
from loopfast.system import processor
from loopfast.system.device import torch_device


def require_type(config: Config, device: str) -> None:
    """Checks that DeepSpeed, where a run shards by it, takes ``model.dtype`` on a processor.

    Without sharding float16 is allowed on every processor: PyTorch emulates it where it has to.

    Args:
        config: the run.
        device: kind of the model's device; a check of anything but ``cpu`` finds nothing.

    Raises:
        ConfigError: it does not.
    """
    sharded = config.distributed.zero_stage > 0
    if not (sharded and config.model.dtype == "float16" and device == "cpu"):
        return
    if not processor.has_kernels("float16"):
        raise ConfigError(
            "model.dtype: found 'float16', allowed: float32 or bfloat16 with distributed.zero_stage above 0 on this "
            f"processor ({processor.model_name()}): DeepSpeed takes float16 only where oneDNN has kernels for it"
        )


def require_settings(config: Config, device: str) -> None:
    """Checks the file of ``distributed.deepspeed``, also by DeepSpeed itself where that is installed.

    Args:
        config: the run.
        device: kind of the model's device, or ``auto``.

    Raises:
        ConfigError: the file cannot be read, contradicts the configuration, or is refused by DeepSpeed.
    """
    file = config.distributed.deepspeed
    if file is None:
        return
    # the size of the buffers, which follows from the number of parameters, is no matter
    settings = deepspeed_settings(config, 0)
    if find_spec("deepspeed") is not None:
        from loopfast.engines.deepspeed import require_accepted

        require_accepted(settings, file, torch_device(device))
