"""Diffusion pipelines as policies: encode prompts, predict model outputs, decode latents."""

from loopfast.policies.base import Conditioning, ForwardWrapper, Policy, expand, pad_rows
from loopfast.policies.loading import load_family, load_policy
from loopfast.policies.local import check_model, local_text_limits
from loopfast.policies.lora_file import adopted_lora, lora_weights
from loopfast.policies.schedulers import load_schedule, load_scheduler, scheduler_notes, trained_steps
from loopfast.policies.signature import (
    adapter_signature,
    addresses,
    layers_with_adapter,
    remove_adapter_layers,
)
from loopfast.policies.source import is_lora
from loopfast.policies.text_limits import TextLimit, read_prompts

__all__ = [
    "Conditioning",
    "ForwardWrapper",
    "Policy",
    "TextLimit",
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
    "local_text_limits",
    "lora_weights",
    "pad_rows",
    "read_prompts",
    "remove_adapter_layers",
    "scheduler_notes",
    "trained_steps",
]
