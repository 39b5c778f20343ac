"""The engine that shards weights, gradients and optimizer state by DeepSpeed's ZeRO (arXiv 1910.02054)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.config import DistributedConfig, TrainConfig
from loopfast.distributed.world import World
from loopfast.engines.base import Engine, require_same, tensor_bytes
from loopfast.engines.deepspeed import initialize, make_contiguous
from loopfast.engines.optimizers import build_optimizer, require_state_of
from loopfast.errors import NonFiniteError
from loopfast.policies import Policy

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """ZeRO stages 1 to 3, which shard the optimizer's state, then the gradients too, then the weights too.

    The denoiser's weights have the type to compute in; the float32 weights are kept with the optimizer's state. Every
    call of the denoiser goes through DeepSpeed, which at stage 3 gathers weights layer by layer. At stage 3 a reference
    model is sharded by an engine of its own.

    Args:
        policy: a policy loaded with ``cast`` (and ``sharded`` at stage 3), see `load_policy`.
        train, distributed: the sections.
        world: the processes, joined to a group of ``torch.distributed`` even if there is only one.

    Raises:
        ConfigError: the settings of ``distributed.deepspeed`` cannot be used, or DeepSpeed refuses ``model.dtype``.
        MissingExtraError: DeepSpeed is not installed.
    """

    def __init__(
        self, policy: Policy, train: TrainConfig, distributed: DistributedConfig, world: World
    ) -> None:
        self._train, self._world, self._policy = train, world, policy
        self.sharded = distributed.zero_stage == 3
        self._named = policy.trainable()
        self._shapes = {name: parameter.shape for name, parameter in self._named.items()}
        make_contiguous(policy.denoiser)
        self._optimizer = build_optimizer(list(self._named.values()), train)
        channels_last = bool(policy.performance_options.get("channels last"))
        module = _Denoiser(policy.denoiser, channels_last)
        self._engine = initialize(module, policy, train, distributed, self._optimizer)
        scaler = self._engine.optimizer.loss_scaler
        # None if the scale is fixed
        self._scaler = scaler if policy.dtype == torch.float16 and scaler.dynamic else None
        self._engines = {id(policy.denoiser): self._engine}
        self._updates = 0
        reference = policy.reference_denoiser
        if reference is not None and self.sharded:
            make_contiguous(reference)
            frozen = _Denoiser(reference, channels_last)
            self._engines[id(reference)] = initialize(frozen, policy, train, distributed)
        policy.attach_engine(self)

    def call(self, denoiser: torch.nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        """Returns ``function(denoiser, *inputs)``, called with gathered weights; see `Policy.attach_engine`."""
        engine = self._engines.get(id(denoiser))
        return function(denoiser, *inputs) if engine is None else engine(function, *inputs)

    @override
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over the processes
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    @override
    def discard(self) -> None:
        self._engine.optimizer.zero_grad(set_to_none=True)

    @override
    def update(self) -> float | None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        try:
            self._engine.step()
        except Exception as error:  # DeepSpeed's scaler raises no more specific class
            if self._scaler is None or "minimum" not in str(error):
                raise
            raise NonFiniteError("the gradient overflows float16 at the smallest loss scale, too") from error
        overflow = self._engine.optimizer.overflow
        if overflow and self._scaler is not None:
            # DeepSpeed has taken no step
            return None
        norm = math.inf if overflow else float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteError("the gradient's norm is not finite")
        self._updates += 1
        return norm

    @override
    @contextmanager
    def gathered(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        import deepspeed

        wanted = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        gathered = deepspeed.zero.GatheredParameters(wanted) if wanted else nullcontext()
        with torch.no_grad(), gathered:
            yield

    @override
    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered_on_main(safe_get_full_fp32_param)

    @override
    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer: dict[str, Tensor] = {}
        if self._optimizer.state:
            for key in _MOMENTS:
                moments = self._gathered_on_main(safe_get_full_optimizer_state, key)
                optimizer |= {f"{name}.{key}": value for name, value in moments.items()}
            step = next(iter(self._optimizer.state.values()))["step"]
            optimizer |= {f"{name}.step": step.detach().cpu().clone() for name in self._named}
        tensors = {"policy": self.weights(), "optimizer": optimizer}
        scaler: dict[str, Any] = {}
        if self._scaler is not None:
            # in the form of `LossScale`, so that another engine can load it
            since = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
            good = int(since % self._scaler.scale_window)
            scaler = {"scale": float(self._scaler.cur_scale), "_growth_tracker": good}
        return tensors, {"updates": self._updates, "scaler": scaler}

    @override
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        import deepspeed

        policy, optimizer = (
            tensors.get(file, {}) if self._world.is_main else {} for file in ("policy", "optimizer")
        )

        def problem() -> str | None:
            try:
                require_same(policy, self._shapes)
                require_state_of(optimizer, eight_bit=False)
            except ValueError as error:
                return str(error)
            return None

        if found := self._world.on_main(problem):
            raise ValueError(found)
        steps = self._world.on_main(
            lambda: [float(v) for k, v in optimizer.items() if k.endswith(".step")][:1]
        )
        for name, parameter in self._named.items():
            value = self._received(policy, name, self._shapes[name])
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.sharded):
                parameter.data.copy_(value)
            self._set(parameter, value)
        self._optimizer.state.clear()
        if steps:
            for flat in self._flat():
                self._optimizer.state[flat] = {
                    "step": torch.tensor(steps[0], device=flat.device if flat.is_cuda else None),
                    **{key: torch.zeros_like(flat) for key in _MOMENTS},
                }
            if not self.sharded:
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()
            for name, parameter in self._named.items():
                for key in _MOMENTS:
                    value = self._received(optimizer, f"{name}.{key}", self._shapes[name])
                    self._set(parameter, value, key)
        self._updates = state["updates"]
        if self._scaler is not None and state["scaler"]:
            self._scaler.cur_scale = state["scaler"]["scale"]
            self._scaler.cur_iter, self._scaler.last_overflow_iter = state["scaler"]["_growth_tracker"], -1

    @override
    def memory(self) -> dict[str, int]:
        optimizer = self._engine.optimizer
        flat = self._flat()
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        gradients: list[Any] = [parameter.grad for parameter in (*self._named.values(), *flat)]
        gradients += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
        for group in getattr(optimizer, "averaged_gradients", {}).values():
            gradients += () if group is None else group
        # the buffers that collect gradients until there are enough to be sent
        for bucket in getattr(optimizer, "ipg_buckets", {}).values():
            gradients += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        reference = self._policy.reference_denoiser
        return {
            "weights": tensor_bytes(_held(self._policy.denoiser)),
            "gradients": tensor_bytes(gradients),
            "optimizer": tensor_bytes([*flat, *states]),
            "reference": 0 if reference is None else tensor_bytes(_held(reference)),
        }

    def _flat(self) -> list[Tensor]:
        """Returns this process's parts of the float32 weights, which the optimizer steps."""
        name = "fp32_partitioned_groups_flat" if self.sharded else "single_partition_of_fp32_groups"
        return list(getattr(self._engine.optimizer, name))

    def _gathered_on_main(self, gather: Callable[..., Tensor], *key: str) -> dict[str, Tensor]:
        """Gathers a tensor of every trained parameter; the first process has them, on the host."""
        found = {}
        for name, parameter in self._named.items():
            value = gather(parameter, *key)
            if self._world.is_main:
                found[name] = value.detach().float().cpu().clone()
        return found

    def _set(self, parameter: Any, value: Tensor, *key: str) -> None:
        """Writes this process's part of a float32 weight, or of its moment ``key``, to the optimizer."""
        from deepspeed import utils

        kind = "optimizer_state" if key else "fp32_param"
        if self.sharded:
            # DeepSpeed's own split fails if the last parts are shorter than the others, or empty
            length = parameter.ds_tensor.numel()
            missing = length * self._world.size - value.numel()
            value = torch.nn.functional.pad(value.flatten(), (0, missing)).split(length)[self._world.rank]
        getattr(utils, f"safe_set_{'local' if self.sharded else 'full'}_{kind}")(parameter, value, *key)

    def _received(self, tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        """Returns a tensor of the first process in float32 on the device, in all processes."""
        value, device = tensors.get(name), self._policy.device
        local = torch.empty(shape, device=device) if value is None else value.to(device, torch.float32)
        return self._world.broadcast(local.contiguous())


class _Denoiser(torch.nn.Module):
    """A module that calls functions of the denoiser, so that DeepSpeed's hooks see the calls."""

    def __init__(self, denoiser: torch.nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._channels_last = channels_last

    def forward(self, function: Callable[..., Any], sample: Tensor, *inputs: Any) -> Any:
        if self._channels_last:
            # sharded weights are not channels-last any more; the layout of the images decides for all layers
            sample = sample.contiguous(memory_format=torch.channels_last)
        return function(self.denoiser, sample, *inputs)


def _held(module: torch.nn.Module) -> list[Tensor | None]:
    """Returns this process's shards of a module's weights, and the weights that are gathered."""
    parameters = list(module.parameters())
    return [p.data for p in parameters] + [getattr(p, "ds_tensor", None) for p in parameters]
