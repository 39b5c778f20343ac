"""What a recorded call of a denoiser depends on besides its inputs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


def addresses(module: torch.nn.Module) -> dict[str, int]:
    """Where each parameter and buffer of a module lies, by name."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.data_ptr() for name, tensor in tensors}


def adapter_signature(module: torch.nn.Module) -> Hashable:
    """Of every layer with a LoRA: which adapters act, how strongly, and whether they are merged.

    A recorded call holds these as constants: the layers decide in Python.
    """
    return tuple(
        (
            name,
            layer.disable_adapters,
            tuple(layer.active_adapters),
            tuple(layer.merged_adapters),
            tuple(sorted(getattr(layer, "scaling", {}).items())),
        )
        for name, layer in layers_with_adapter(module).items()
    )


def layers_with_adapter(module: torch.nn.Module) -> dict[str, Any]:
    """The layers of a module that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
