"""The low-rank adapter of a denoiser: added, switched off, and put into the form that others read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor

from loopfast.config import LoraConfig as LoraSettings
from loopfast.errors import ConfigError
from loopfast.policies.signature import layers_with_adapter
from loopfast.seeds import derive

ADAPTER = "loopfast"


def lora_config(settings: LoraSettings, targets: Sequence[str]) -> LoraConfig:
    """What peft calls these settings."""
    return LoraConfig(
        r=settings.rank,
        # peft annotates it as an int and divides it by the rank
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=list(targets),
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        use_dora=settings.dora,
    )


def add_adapter(
    module: torch.nn.Module, settings: LoraSettings, targets: Sequence[str], *, seed: int, dtype: torch.dtype
) -> None:
    """Adds an adapter to a frozen module; its parameters are the only ones that require gradients.

    Args:
        module: any.
        settings: the section ``model.lora``.
        targets: the modules that get one, by their names' ends.
        seed: of its first values.
        dtype: of its parameters.

    Raises:
        ConfigError: no module has such a name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "adapter"))
        try:
            inject_adapter_in_model(lora_config(settings, targets), module, adapter_name=ADAPTER)
        except ValueError as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(f"model.lora.targets: {list(targets)}: {reason}") from error
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def without_adapter(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the module computes what it did before an adapter was added."""
    layers = list(layers_with_adapter(module).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapter(module: torch.nn.Module) -> None:
    """Adds the adapter to the weights, in place, and puts the plain layers back."""
    for name, layer in layers_with_adapter(module).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())


def exported_adapter(
    module: torch.nn.Module, settings: LoraSettings, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The adapter's weights under the names that diffusers reads.

    Readers take alpha to be the rank unless told, each release in its own way: the factor alpha / rank goes into the
    weights.

    Args:
        module: the one with the adapter.
        settings: the section ``model.lora``.
        weights: the trained ones, by the names of the module's parameters.
    """
    factor = settings.alpha / settings.rank
    layers = get_peft_model_state_dict(module, state_dict=dict(weights), adapter_name=ADAPTER)
    return {name: value * factor if "lora_B" in name else value for name, value in layers.items()}
