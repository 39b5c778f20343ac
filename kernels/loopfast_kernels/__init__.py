"""Ops for reinforcement learning on diffusion models, made to be embedded in other codebases.

They need torch and nothing else. Every op works on ``N`` independent rows of latents and one table of
transition coefficients; ``kernels/README.md`` shows how to call them.
"""

from .backends import BACKENDS, BackendUnavailableError, backend, info
from .denoise_step import denoise_step, denoise_step_
from .group_norm_silu import group_norm_silu
from .leave_one_out import leave_one_out
from .loop_loss import LoopLoss, clipped_loss, loop_loss
from .philox import philox_normal
from .transition_logprob import transition_logprob

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "BackendUnavailableError",
    "LoopLoss",
    "backend",
    "clipped_loss",
    "denoise_step",
    "denoise_step_",
    "group_norm_silu",
    "info",
    "leave_one_out",
    "loop_loss",
    "philox_normal",
    "transition_logprob",
]
