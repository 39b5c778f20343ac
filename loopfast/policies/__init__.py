"""Diffusion pipelines as policies: encode prompts, predict model outputs, decode latents."""

from loopfast.policies.base import Caller, Conditioning, Policy, expand, pad_rows
from loopfast.policies.loading import (
    adopted_lora,
    check_model,
    load_family,
    load_policy,
    load_schedule,
    load_scheduler,
    torch_device,
    trained_steps,
)
from loopfast.policies.lora_file import lora_weights
from loopfast.policies.signature import adapter_signature, addresses, layers_with_adapter
from loopfast.policies.source import is_lora

__all__ = [
    "Caller",
    "Conditioning",
    "Policy",
    "adapter_signature",
    "addresses",
    "adopted_lora",
    "check_model",
    "expand",
    "is_lora",
    "layers_with_adapter",
    "load_family",
    "load_policy",
    "load_schedule",
    "load_scheduler",
    "lora_weights",
    "pad_rows",
    "torch_device",
    "trained_steps",
]
