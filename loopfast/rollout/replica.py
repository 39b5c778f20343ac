"""A second denoiser to sample from, where the rollout asks for another type, device or form than training."""

from __future__ import annotations

import copy
from typing import Any

import torch

from loopfast.config import RolloutConfig
from loopfast.policies import Policy, torch_device


class Replica:
    """A copy of a policy's denoiser at fixed addresses, made equal to it again before sampling.

    Args:
        policy: what is copied.
        dtype: of the copy's weights and its latents; None: those of the policy.
        device: where the copy is.
        merge_lora: add the adapter to the base weights, ``W + alpha / rank · B A``, and do without its layers.

    Attributes:
        policy: predicts with the copy.
    """

    def __init__(
        self, policy: Policy, *, dtype: torch.dtype | None, device: torch.device, merge_lora: bool
    ) -> None:
        self._source = policy
        denoiser = copy.deepcopy(policy.denoiser).requires_grad_(False)
        self._merged = _merge_layers(denoiser) if merge_lora else []
        denoiser.to(device, dtype)
        for name, module in policy.denoiser.named_modules():
            if module._compiled_call_impl is not None:  # which a copy does not take along
                denoiser.get_submodule(name).compile(dynamic=False)
        # weights that have the type to compute in need no autocast; float32 ones kept for training do
        autocast = dtype is None and any(
            parameter.is_floating_point() and parameter.dtype != policy.dtype
            for parameter in policy.trainable().values()
        )
        autocast = autocast and not _layers_with_adapter(policy.denoiser)
        self.policy = policy.with_denoiser(denoiser, device, dtype or policy.dtype, autocast=autocast)
        self._targets = dict(denoiser.named_parameters())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies what training changed into the replica's weights, which stay where they are."""
        if self._merged:
            sources = _layers_with_adapter(self._source.denoiser)
            for name in self._merged:
                layer = sources[name]
                for adapter in layer.active_adapters:
                    weight = layer.get_base_layer().weight
                    merged = weight.float() + layer.get_delta_weight(adapter).float()
                    self._targets[f"{name}.weight" if name else "weight"].copy_(merged)
            return
        for name, parameter in self._source.trainable().items():
            self._targets[name].copy_(parameter)


def make_replica(policy: Policy, config: RolloutConfig) -> Replica | None:
    """The replica that a configuration asks for; None where the policy itself can be sampled from.

    Raises:
        ConfigError: ``rollout.device`` is not there.
    """
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    device = policy.device if config.device is None else torch_device(config.device, key="rollout.device")
    if dtype == policy.dtype:
        dtype = None
    same_device = torch.empty(0, device=device).device == torch.empty(0, device=policy.device).device
    if dtype is None and same_device and not config.merge_lora:
        return None
    return Replica(policy, dtype=dtype, device=device, merge_lora=config.merge_lora)


def _layers_with_adapter(module: torch.nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def _merge_layers(module: torch.nn.Module) -> list[str]:
    """Puts the layers that adapters were added to back in their places; returns their names."""
    layers = _layers_with_adapter(module)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    return list(layers)
