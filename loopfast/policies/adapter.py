"""The low-rank adapter of a denoiser: adds it, switches it off, merges it and names its weights for an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from typing_extensions import override

from loopfast.config import LoraConfig as LoraSettings
from loopfast.errors import as_config_error
from loopfast.policies.signature import ADAPTER, layers_with_adapter, remove_adapter_layers
from loopfast.seeds import derive


class CastLinear(nn.Linear):
    """A factor of an adapter that multiplies in its input's type, whatever its weight's type is."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class CastConv2d(nn.Conv2d):
    """A `CastLinear` for the adapter of a convolution."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), None)


_CAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: CastLinear, nn.Conv2d: CastConv2d}


def lora_config(settings: LoraSettings, targets: Sequence[str]) -> LoraConfig:
    """Returns peft's form of these settings."""
    return LoraConfig(
        r=settings.rank,
        # peft annotates it as an int and divides it by the rank
        lora_alpha=settings.alpha,
        target_modules=list(targets),
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        use_dora=settings.dora,
    )


def add_adapter(
    module: torch.nn.Module, settings: LoraSettings, targets: Sequence[str], *, seed: int, dtype: torch.dtype
) -> None:
    """Adds an adapter to a frozen module; its parameters are the only ones that require gradients.

    The adapter computes in the type of its layer's input. Where ``dtype`` is float32 and the input has 16 bits, its
    weights are rounded for each product, and the optimizer and the gradients keep float32, as under autocast. DoRA
    computes in ``dtype``, because the norms of the weights' columns need it.

    The modules whose names end with one of ``targets`` get an adapter, with parameters in ``dtype`` whose first values
    have the ``seed``. It is a `ConfigError` if there is no such module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "adapter"))
        with as_config_error(f"model.lora.targets: {list(targets)}", ValueError):
            inject_adapter_in_model(lora_config(settings, targets), module, adapter_name=ADAPTER)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for layer in layers_with_adapter(module).values():
        if settings.dora:
            _measure_columns(layer)
        else:
            _compute_in_the_type_of_the_input(layer)


def _measure_columns(layer: Any) -> None:
    """Makes DoRA start at the base model: peft's first norms have the base's type, which may have 16 bits."""
    factors = {"lora_A": layer.lora_A[ADAPTER].weight, "lora_B": layer.lora_B[ADAPTER].weight}
    layer.lora_magnitude_vector[ADAPTER].update_layer(
        base_layer=layer.get_base_layer(), scaling=layer.scaling[ADAPTER], **factors
    )


def _compute_in_the_type_of_the_input(layer: Any) -> None:
    """Keeps peft from casting a layer's whole input to the type of the adapter's weights."""
    factors = [layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]]
    if all(type(factor) in _CAST for factor in factors):
        layer.cast_input_dtype_enabled = False
        for factor in factors:
            factor.__class__ = _CAST[type(factor)]


@contextmanager
def without_adapter(module: torch.nn.Module) -> Iterator[None]:
    """Context in which the module computes without its adapter."""
    layers = list(layers_with_adapter(module).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapter(module: torch.nn.Module) -> None:
    """Adds the adapter to the weights, in place, and removes its layers."""
    for layer in layers_with_adapter(module).values():
        layer.merge()
    remove_adapter_layers(module)


def exported_adapter(
    module: torch.nn.Module, settings: LoraSettings, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the adapter's weights under the names that diffusers reads.

    Releases of diffusers read alpha in different ways, and without it take the rank: the factor alpha / rank is
    therefore a part of the weights. ``weights`` are the trained ones, by the names of the module's parameters.
    """
    factor = settings.alpha / settings.rank
    layers = get_peft_model_state_dict(module, state_dict=dict(weights), adapter_name=ADAPTER)
    return {name: value * factor if "lora_B" in name else value for name, value in layers.items()}
