"""Engines own the trained weights and the optimizer."""

from loopfast.config import Config
from loopfast.engines.base import Engine
from loopfast.engines.local import LocalEngine
from loopfast.engines.refusals import require_settings, require_type
from loopfast.engines.settings import deepspeed_settings
from loopfast.group import Group
from loopfast.policies import Policy

__all__ = [
    "Engine",
    "LocalEngine",
    "build_engine",
    "deepspeed_settings",
    "needs_deepspeed",
    "require_settings",
    "require_type",
]


def build_engine(policy: Policy, config: Config, group: Group) -> Engine:
    """The engine that a configuration needs in a group of processes."""
    if not needs_deepspeed(config, group.size):
        return LocalEngine(policy, config.train)
    if config.distributed.zero_stage == 0:
        from loopfast.engines.replicated import ReplicatedEngine

        return ReplicatedEngine(policy, config, group)
    from loopfast.engines.zero3 import ZeroEngine

    return ZeroEngine(policy, config, group)


def needs_deepspeed(config: Config, processes: int) -> bool:
    """Whether a run needs DeepSpeed: many processes, anything sharded or offloaded, or a file of its settings."""
    distributed = config.distributed
    return processes > 1 or distributed.zero_stage > 0 or distributed.deepspeed is not None
