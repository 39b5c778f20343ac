"""AdamW, by PyTorch or with bitsandbytes' 8-bit moments, and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopfast.config import TrainConfig
from loopfast.errors import MissingExtraError

# bitsandbytes' tables from 8 bits to numbers: the same for every parameter and every run
_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``train.optimizer`` names.

    Raises:
        MissingExtraError: it needs bitsandbytes, which is not installed.
    """
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError("train.optimizer: adamw_8bit", "bnb", error.name) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as tensors ``<parameter>.<key>``; counters become int64 scalars."""
    return {
        f"{name}.{key}": value.contiguous() if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in _TABLES
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    """Takes back what `optimizer_state` gave.

    Raises:
        ValueError: it is another optimizer's.
    """
    eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    if any(name.endswith(".state1") for name in saved) != eight_bit and saved:
        raise ValueError("its optimizer state is not that of train.optimizer")
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition(".")
        parameter = named[name]
        state = optimizer.state[parameter]
        if eight_bit and key == "step":
            state[key] = int(value)
        elif value.shape == parameter.shape:
            # fused kernels walk a parameter and its moments side by side: they must be laid out alike
            state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            state[key] = value.to(parameter.device)
        if eight_bit and value.dtype == torch.uint8:
            _add_tables(optimizer, state, parameter.device)


def _add_tables(optimizer: Any, state: dict[str, Any], device: torch.device) -> None:
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    for key, table in _TABLES.items():
        optimizer.name2qmap[table] = optimizer.name2qmap[table].to(device)
        state[key] = optimizer.name2qmap[table]
