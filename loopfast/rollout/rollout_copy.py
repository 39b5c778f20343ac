"""The rollout copy: a second denoiser to sample from, of another type, device or form than the trained one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from loopfast.config import RolloutConfig
from loopfast.policies import Policy, layers_with_adapter, remove_adapter_layers
from loopfast.system.device import torch_device

Gathered = Callable[[Iterable[torch.nn.Parameter]], AbstractContextManager[None]]
"""A context in which parameters that an engine has sharded have their full values."""


class RolloutCopy:
    """A copy of a policy's denoiser, made equal to it again before sampling.

    It must be made before an engine spreads the policy's weights over processes.

    Args:
        policy: the policy whose denoiser is copied.
        dtype: the type of the copy's weights and its latents. None takes the policy's.
        device: the copy's device.
        merge_lora: add the adapter to the base weights, ``W + alpha / rank · B A``, and do without its layers.
        resident: keep the copy, at fixed addresses, and refresh the weights that training changes. False makes the
            copy for each use, from all weights, and frees it afterwards.

    Attributes:
        policy: the policy that predicts with the copy.
        resident: as given.
        exact: whether the copy computes the policy's own outputs, bit for bit.
        gathered: the context in which the policy's weights are read; an engine that shards them sets it.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        merge_lora: bool,
        resident: bool = True,
    ) -> None:
        self._source, self.resident, self._users = policy, resident, 0
        self.gathered: Gathered = lambda parameters: nullcontext()
        self.exact = dtype is None and not merge_lora and device.type == policy.device.type
        # the copied parameters still require gradients: a compiled graph depends on it
        denoiser = copy.deepcopy(policy.denoiser)
        self._merged = remove_adapter_layers(denoiser) if merge_lora else []
        denoiser.to(device, dtype)
        for name, module in policy.denoiser.named_modules():
            if module._compiled_call_impl is not None:  # deepcopy does not copy it
                denoiser.get_submodule(name).compile(dynamic=False)
        # weights that have the type to compute in need no autocast; float32 ones kept for training do
        autocast = dtype is None and any(
            parameter.is_floating_point() and parameter.dtype != policy.dtype
            for parameter in policy.trainable().values()
        )
        autocast = autocast and not layers_with_adapter(policy.denoiser)
        self.policy = policy.with_denoiser(denoiser, device, dtype or policy.dtype, autocast=autocast)
        self._targets = dict(denoiser.named_parameters())
        if not resident:
            self._free()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context in which the copy equals the policy as it was on entering; uses may be nested."""
        self._users += 1
        try:
            if self._users == 1:
                self._refresh()
            yield
        finally:
            self._users -= 1
            if not (self.resident or self._users):
                self._free()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Copies weights, a layer at a time: those that training changed, or all if none were kept."""
        if self._merged:
            self._merge()
            return
        if self.resident:
            parameters = self._source.trainable()
        else:
            parameters = dict(self._source.denoiser.named_parameters())
            for target, (shape, stride) in self._freed.items():
                target.data = torch.empty_strided(shape, stride, dtype=target.dtype, device=target.device)
        layers: dict[str, dict[str, torch.nn.Parameter]] = {}
        for name, parameter in parameters.items():
            layers.setdefault(name.rpartition(".")[0], {})[name] = parameter
        for layer in layers.values():
            with self.gathered(layer.values()):
                for name, parameter in layer.items():
                    self._targets[name].copy_(parameter)

    def _merge(self) -> None:
        sources = layers_with_adapter(self._source.denoiser)
        for name in self._merged:
            layer = sources[name]
            with self.gathered(layer.parameters()):
                for adapter in layer.active_adapters:
                    weight = layer.get_base_layer().weight
                    merged = weight.float() + layer.get_delta_weight(adapter).float()
                    self._targets[f"{name}.weight" if name else "weight"].copy_(merged)

    def _free(self) -> None:
        self._freed = {target: (target.shape, target.stride()) for target in self._targets.values()}
        for target in self._targets.values():
            target.data = target.data.new_empty(0)


def make_rollout_copy(policy: Policy, config: RolloutConfig, *, sharded: bool = False) -> RolloutCopy | None:
    """Returns the rollout copy that a configuration asks for; None if the policy itself can be sampled from.

    Args:
        policy: the policy, before an engine has its weights.
        config: the section ``rollout``.
        sharded: whether an engine is about to shard the policy's weights.

    Raises:
        ConfigError: there is no such device as ``rollout.device``.
    """
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    device = policy.device if config.device is None else torch_device(config.device, key="rollout.device")
    if dtype == policy.dtype:
        dtype = None
    same_device = torch.empty(0, device=device).device == torch.empty(0, device=policy.device).device
    wanted = dtype is not None or not same_device or config.merge_lora or sharded
    kind = config.replica
    if kind == "auto":
        adapter = len(policy.trainable()) < len(list(policy.denoiser.parameters()))
        kind = "none" if not wanted else "gathered" if sharded and not adapter else "resident"
    if kind == "none":
        return None
    return RolloutCopy(
        policy, dtype=dtype, device=device, merge_lora=config.merge_lora, resident=kind == "resident"
    )
