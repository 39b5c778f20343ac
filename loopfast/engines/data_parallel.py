"""The engine that holds all weights in every process and sums the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.config import DistributedConfig, TrainConfig
from loopfast.distributed.world import World
from loopfast.engines.deepspeed import initialize, make_contiguous
from loopfast.engines.local import LocalEngine
from loopfast.policies import Policy


class ReplicatedEngine(LocalEngine):
    """ZeRO stage 0: every process holds everything, and DeepSpeed sums the gradients.

    The arguments are those of `ZeroEngine`, for a policy loaded without ``cast``.

    Raises:
        ConfigError: the settings of ``distributed.deepspeed`` cannot be used.
        MissingExtraError: DeepSpeed is not installed.
    """

    retries = False

    def __init__(
        self, policy: Policy, train: TrainConfig, distributed: DistributedConfig, world: World
    ) -> None:
        self._world = world
        make_contiguous(policy.denoiser)
        super().__init__(policy, train)
        # DeepSpeed only reduces the gradients: the base class clips them and takes the steps
        module = torch.nn.ParameterList(self._parameters)
        self._engine = initialize(module, policy, train, distributed, self._optimizer)

    @override
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over the processes
        self._engine.backward(self._scale.scaled(loss) * self._world.size, scale_wrt_gas=False)

    @override
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        layout = self._world.on_main(
            lambda: {
                file: {name: (value.shape, value.dtype) for name, value in tensors.get(file, {}).items()}
                for file in ("policy", "optimizer", "average")
            }
        )
        received = {
            file: {
                name: self._world.broadcast(
                    tensors[file][name] if self._world.is_main else torch.empty(shape, dtype=dtype)
                )
                for name, (shape, dtype) in named.items()
            }
            for file, named in layout.items()
        }
        super().load_state(received, state)
