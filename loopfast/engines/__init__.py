"""Engines own the trained weights and the optimizer."""

from loopfast.config import DistributedConfig, TrainConfig
from loopfast.distributed.world import World
from loopfast.engines.base import Engine
from loopfast.engines.deepspeed import require_settings, require_type
from loopfast.engines.deepspeed_config import deepspeed_settings
from loopfast.engines.local import LocalEngine
from loopfast.policies import Policy

__all__ = [
    "Engine",
    "LocalEngine",
    "build_engine",
    "deepspeed_settings",
    "require_settings",
    "require_type",
]


def build_engine(policy: Policy, train: TrainConfig, distributed: DistributedConfig, world: World) -> Engine:
    """Returns the engine that owns a policy's weights in a group of processes."""
    if not distributed.needs_deepspeed(world.size):
        return LocalEngine(policy, train)
    if distributed.zero_stage == 0:
        from loopfast.engines.data_parallel import ReplicatedEngine

        return ReplicatedEngine(policy, train, distributed, world)
    from loopfast.engines.zero import ZeroEngine

    return ZeroEngine(policy, train, distributed, world)
