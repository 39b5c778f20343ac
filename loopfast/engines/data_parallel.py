"""All weights in every process, and gradients added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.config import Config
from loopfast.distributed.world import World
from loopfast.engines.deepspeed import initialize, lay_out, require_same_everywhere
from loopfast.engines.local import LocalEngine
from loopfast.policies import Policy


class ReplicatedEngine(LocalEngine):
    """Stage 0: every process has everything, and DeepSpeed adds up the gradients.

    Args:
        policy: whose trainable parameters it owns.
        config: the run.
        world: the processes; joined to a group of ``torch.distributed``.

    Raises:
        ConfigError: the settings of ``distributed.deepspeed`` cannot be used.
        MissingExtraError: DeepSpeed is not installed.
    """

    retries = False

    def __init__(self, policy: Policy, config: Config, world: World) -> None:
        self._world = world
        lay_out(policy.denoiser)
        super().__init__(policy, config.train)
        module = torch.nn.ParameterList(self._parameters)
        # not the clipping, nor the step, which are the base's
        self._engine = initialize(module, config, policy, self._optimizer, self._parameters)

    @override
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # it takes the processes' mean
        self._engine.backward(self._scale.scaled(loss) * self._world.size, scale_wrt_gas=False)

    @override
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        require_same_everywhere(self._world, tensors, {name: p.shape for name, p in self._named.items()})
        known = self._world.on_main(
            lambda: {
                group: {name: (value.shape, value.dtype) for name, value in tensors.get(group, {}).items()}
                for group in ("policy", "optimizer", "average")
            }
        )
        received = {
            group: {
                name: self._world.broadcast(
                    tensors[group][name] if self._world.is_main else torch.empty(shape, dtype=dtype)
                )
                for name, (shape, dtype) in named.items()
            }
            for group, named in known.items()
        }
        super().load_state(received, state)
