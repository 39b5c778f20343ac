"""Diffusion pipelines as policies: encode prompts, predict model outputs, decode latents."""

from loopfast.policies.base import Caller, Conditioning, Policy, expand, pad_rows
from loopfast.policies.loading import (
    load_family,
    load_policy,
    load_schedule,
    load_scheduler,
    scheduler_notes,
    torch_device,
    trained_steps,
)
from loopfast.policies.signature import adapter_signature, addresses, layers_with_adapter

__all__ = [
    "Caller",
    "Conditioning",
    "Policy",
    "adapter_signature",
    "addresses",
    "expand",
    "layers_with_adapter",
    "load_family",
    "load_policy",
    "load_schedule",
    "load_scheduler",
    "pad_rows",
    "scheduler_notes",
    "torch_device",
    "trained_steps",
]
