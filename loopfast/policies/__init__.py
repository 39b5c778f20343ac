"""Diffusion pipelines as policies: encode prompts, predict model outputs, decode latents."""

from loopfast.policies.base import Caller, Conditioning, Policy, expand, pad_rows
from loopfast.policies.loading import (
    load_policy,
    load_schedule,
    load_scheduler,
    torch_device,
    trained_steps,
)
from loopfast.policies.signature import adapter_signature, addresses

__all__ = [
    "Caller",
    "Conditioning",
    "Policy",
    "adapter_signature",
    "addresses",
    "expand",
    "load_policy",
    "load_schedule",
    "load_scheduler",
    "pad_rows",
    "torch_device",
    "trained_steps",
]
