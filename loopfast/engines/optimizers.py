"""AdamW, by PyTorch or with bitsandbytes' 8-bit moments, and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopfast.config import TrainConfig
from loopfast.errors import MissingExtraError

# bitsandbytes' tables from 8-bit codes to numbers, which are the same for every parameter and every run
_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimizer that ``train.optimizer`` names.

    Raises:
        MissingExtraError: the optimizer needs bitsandbytes, which is not installed.
    """
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.beta1, train.beta2),
        "weight_decay": train.weight_decay,
    }
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError("train.optimizer: adamw_8bit", "bnb", error.name) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state as tensors named ``<parameter>.<key>``. Counters become int64 scalars."""
    return {
        f"{name}.{key}": value.contiguous() if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in _TABLES
    }


def require_state_of(saved: Mapping[str, Tensor], *, eight_bit: bool) -> None:
    """Checks that a saved state, unless it is empty, is one of an optimizer with or without 8-bit moments.

    Raises:
        ValueError: the state is another optimizer's.
    """
    if saved and any(name.endswith(".state1") for name in saved) != eight_bit:
        raise ValueError("its optimizer state is not that of train.optimizer")


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    """Restores a state that `optimizer_state` returned.

    Raises:
        ValueError: the state is another optimizer's.
    """
    eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    require_state_of(saved, eight_bit=eight_bit)
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition(".")
        parameter = named[name]
        state = optimizer.state[parameter]
        if eight_bit and key == "step":
            state[key] = int(value)
        elif value.shape == parameter.shape:
            # fused kernels need the strides of a parameter and its moments to be equal
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
