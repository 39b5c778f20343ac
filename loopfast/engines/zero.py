"""Weights, gradients and optimizer state spread over processes, by DeepSpeed's ZeRO (arXiv 1910.02054)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.config import Config
from loopfast.distributed.world import World
from loopfast.engines.base import Engine, learning_rate, tensor_bytes
from loopfast.engines.deepspeed import initialize, lay_out, require_same_everywhere
from loopfast.engines.optimizers import build_optimizer
from loopfast.errors import NonFiniteError
from loopfast.policies import Policy

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """Stages 1 to 3: each process holds a part of the optimizer's state, then of the gradients, then of the weights.

    The denoiser's weights have the type to compute in, and the float32 ones lie with the optimizer's state. At stage 3
    every call of the denoiser goes through DeepSpeed, which gathers weights layer by layer; a reference model is
    sharded by an engine of its own.

    Args:
        policy: loaded with ``cast`` (and ``sharded`` at stage 3), see `load_policy`.
        config: the run.
        world: the processes; joined to a group of ``torch.distributed``, one process included.

    Raises:
        ConfigError: the settings of ``distributed.deepspeed`` cannot be used, or DeepSpeed refuses ``model.dtype``.
        MissingExtraError: DeepSpeed is not installed.
    """

    retries = False

    def __init__(self, policy: Policy, config: Config, world: World) -> None:
        self._config, self._world, self._policy = config.train, world, policy
        self.sharded = config.distributed.zero_stage == 3
        self._scaled = policy.dtype == torch.float16
        self._named = policy.trainable()
        self._shapes = {name: parameter.shape for name, parameter in self._named.items()}
        lay_out(policy.denoiser)
        parameters = list(self._named.values())
        self._optimizer = build_optimizer(parameters, config.train)
        channels_last = bool(policy.levers.get("channels last"))
        module = _Denoiser(policy.denoiser, channels_last)
        self._engine = initialize(module, config, policy, self._optimizer, parameters)
        self._engines = {id(policy.denoiser): self._engine}
        self._updates = 0
        reference = policy.reference_denoiser
        if reference is not None and self.sharded:
            lay_out(reference)
            frozen = _Denoiser(reference, channels_last)
            self._engines[id(reference)] = initialize(frozen, config, policy, None, [])
        policy.hand_over(self)

    def call(self, denoiser: torch.nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        """What ``function(denoiser, *inputs)`` returns, its weights being gathered; see `Policy.hand_over`."""
        engine = self._engines.get(id(denoiser))
        return function(denoiser, *inputs) if engine is None else engine(function, *inputs)

    @property
    @override
    def learning_rate(self) -> float:
        return learning_rate(self._config, self._updates)

    @override
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # it takes the processes' mean
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
        except Exception as error:
            # it is an Exception and nothing more specific
            if not (self._scaled and "minimum" in str(error)):
                raise
            raise NonFiniteError("the gradient overflows float16 at the smallest loss scale, too") from error
        if self._engine.optimizer.overflow:
            # DeepSpeed has taken no step
            if self._scaled and self._engine.optimizer.loss_scaler.dynamic:
                return None
            raise NonFiniteError("the gradient's norm is not finite")
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteError("the gradient's norm is not finite")
        self._updates += 1
        return norm

    @override
    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    @override
    @contextmanager
    def whole(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        import deepspeed

        wanted = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        gathered = deepspeed.zero.GatheredParameters(wanted) if wanted else nullcontext()
        with torch.no_grad(), gathered:
            yield

    @override
    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._on_first(safe_get_full_fp32_param)

    @override
    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer: dict[str, Tensor] = {}
        if self._optimizer.state:
            for key in _MOMENTS:
                moments = self._on_first(partial(safe_get_full_optimizer_state, optim_state_key=key))
                optimizer |= {f"{name}.{key}": value for name, value in moments.items()}
            step = next(iter(self._optimizer.state.values()))["step"]
            optimizer |= {f"{name}.step": step.detach().cpu().clone() for name in self._named}
        tensors = {"policy": self.weights(), "optimizer": optimizer}
        return tensors, {"updates": self._updates, "scaler": self._scaler_state()}

    @override
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        require_same_everywhere(self._world, tensors, self._shapes)
        optimizer = tensors.get("optimizer", {}) if self._world.is_main else {}
        steps = self._world.on_main(
            lambda: [float(v) for k, v in optimizer.items() if k.endswith(".step")][:1]
        )
        if problem := self._world.on_main(lambda: _other_optimizer(optimizer)):
            raise ValueError(problem)
        for name, parameter in self._named.items():
            value = self._received(
                tensors["policy"][name] if self._world.is_main else None, self._shapes[name]
            )
            with self._written(parameter):
                parameter.data.copy_(value)
            self._set(parameter, value)
        self._optimizer.state.clear()
        for flat in self._flat() if steps else ():
            self._optimizer.state[flat] = {
                "step": torch.tensor(steps[0], device=flat.device if flat.is_cuda else None),
                **{key: torch.zeros_like(flat) for key in _MOMENTS},
            }
        if steps:
            if not self.sharded:
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()
            for name, parameter in self._named.items():
                for key in _MOMENTS:
                    value = self._received(optimizer.get(f"{name}.{key}"), self._shapes[name])
                    self._set(parameter, value, key)
        self._updates = state["updates"]
        scaler = self._engine.optimizer.loss_scaler
        if self._scaled and scaler.dynamic and state["scaler"]:
            scaler.cur_scale = state["scaler"]["scale"]
            scaler.cur_iter, scaler.last_overflow_iter = state["scaler"]["_growth_tracker"], -1

    @override
    def memory(self) -> dict[str, int]:
        optimizer = self._engine.optimizer
        flat = self._flat()
        states = (value for state in self._optimizer.state.values() for value in state.values())
        gradients = [parameter.grad for parameter in self._named.values()]
        gradients += [value for group in _averaged(optimizer) for value in group]
        gradients += [part.grad for part in flat]
        gradients += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
        gradients += _buckets(optimizer)
        reference = self._policy.reference_denoiser
        return {
            "weights": tensor_bytes(_held(self._policy.denoiser)),
            "gradients": tensor_bytes(value for value in gradients if isinstance(value, Tensor)),
            "optimizer": tensor_bytes([*flat, *(value for value in states if isinstance(value, Tensor))]),
            "reference": 0 if reference is None else tensor_bytes(_held(reference)),
        }

    def _flat(self) -> list[Tensor]:
        """The float32 weights that the optimizer steps, this process's parts."""
        optimizer = self._engine.optimizer
        parts = (
            optimizer.fp32_partitioned_groups_flat
            if self.sharded
            else optimizer.single_partition_of_fp32_groups
        )
        return list(parts)

    def _on_first(self, whole: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """What is whole of every trained parameter, on the host, in the first process."""
        found = {}
        for name, parameter in self._named.items():
            value = whole(parameter)
            if self._world.is_main:
                found[name] = value.detach().float().cpu().clone()
        return found

    def _set(self, parameter: Any, value: Tensor, *key: str) -> None:
        """Writes a whole float32 weight, or a moment of it, where the optimizer has this process's part."""
        from deepspeed import utils

        kind = "optimizer_state" if key else "fp32_param"
        if self.sharded:
            # DeepSpeed's own cut fails where the last parts are shorter than the others, or empty
            length = parameter.ds_tensor.numel()
            missing = length * self._world.size - value.numel()
            value = torch.nn.functional.pad(value.flatten(), (0, missing)).split(length)[self._world.rank]
        getattr(utils, f"safe_set_{'local' if self.sharded else 'full'}_{kind}")(parameter, value, *key)

    def _received(self, value: Tensor | None, shape: torch.Size) -> Tensor:
        home = self._policy.device
        mine = torch.empty(shape, device=home) if value is None else value.to(home, torch.float32)
        return self._world.broadcast(mine.contiguous())

    def _written(self, parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
        if not self.sharded:
            return nullcontext()
        import deepspeed

        written: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        return written

    def _scaler_state(self) -> dict[str, Any]:
        """As `LossScale` has it, so that another engine can go on from it; nothing where the scale is fixed."""
        scaler = self._engine.optimizer.loss_scaler
        if not (self._scaled and scaler.dynamic):
            return {}
        good = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return {"scale": float(scaler.cur_scale), "_growth_tracker": int(good)}


class _Denoiser(torch.nn.Module):
    """Calls a function of the denoiser as one module, which DeepSpeed's hooks need."""

    def __init__(self, denoiser: torch.nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._channels_last = channels_last

    def forward(self, function: Callable[..., Any], sample: Tensor, *inputs: Any) -> Any:
        if self._channels_last:
            # the weights have lost their layout to the shards; the images give it to all that follows
            sample = sample.contiguous(memory_format=torch.channels_last)
        return function(self.denoiser, sample, *inputs)


def _other_optimizer(saved: Mapping[str, Tensor]) -> str | None:
    if any(name.endswith(".state1") for name in saved):
        return "its optimizer state is not that of train.optimizer"
    return None


def _held(module: torch.nn.Module) -> list[Tensor]:
    """What this process holds of a module's weights: shards, and whole ones where they are gathered."""
    tensors: list[Tensor] = []
    for parameter in module.parameters():
        tensors += [
            part for part in (parameter.data, getattr(parameter, "ds_tensor", None)) if part is not None
        ]
    return tensors


def _averaged(optimizer: Any) -> list[list[Any]]:
    groups = getattr(optimizer, "averaged_gradients", {})
    return [list(group) for group in groups.values() if group is not None]


def _buckets(optimizer: Any) -> list[Any]:
    """What gradients are collected in until enough of them can be sent."""
    buffers = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    return [part for buffer in buffers for part in (buffer if isinstance(buffer, list) else [buffer])]
