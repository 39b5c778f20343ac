"""Checks a model on this machine without loading it."""

from __future__ import annotations

from pathlib import Path

from loopfast.config import ModelConfig
from loopfast.policies.families import Family
from loopfast.policies.loading import load_family
from loopfast.policies.lora_file import lora_weights
from loopfast.policies.source import local_path, locate


def check_model(config: ModelConfig) -> Family | None:
    """Returns the family of a model on this machine; None for a hub name, which is not looked up.

    Raises:
        ConfigError: ``model.pretrained`` or ``model.lora.from`` names a local path with the wrong content.
    """
    start = config.lora.from_
    if start is not None and local_path("model.lora.from", start) is not None:
        lora_weights(config)
    return load_family(config) if isinstance(locate(config), Path) else None
