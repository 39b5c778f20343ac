"""The state of a denoiser that a recorded call of it depends on: addresses and adapters."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

ADAPTER = "loopfast"
"""The name of the trained adapter in peft."""


def addresses(module: torch.nn.Module) -> dict[str, int]:
    """Returns the address of each parameter and buffer of a module, by name."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.data_ptr() for name, tensor in tensors}


def adapter_signature(module: torch.nn.Module) -> Hashable:
    """Returns the active adapters of every layer with a LoRA, their scaling, and whether they are merged.

    A recorded call holds these as constants, because the layers decide in Python.
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
    """Returns the layers of a module that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def remove_adapter_layers(module: torch.nn.Module) -> list[str]:
    """Puts the layers that adapters were added to back in their places, and returns their names."""
    layers = layers_with_adapter(module)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    return list(layers)
