"""Patches that let other codebases for reinforcement learning on diffusion models use the fused ops.

Each patch is one call, changes no line of the other codebase and can be undone. A codebase is imported only when its
function is called.
"""

from .ddpo_pytorch import patch_ddpo_pytorch
from .flow_grpo import patch_flow_grpo
from .patching import Patch
from .trl import patch_trl

__all__ = ["Patch", "patch_ddpo_pytorch", "patch_flow_grpo", "patch_trl"]
