"""Loads an exported model into a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loopfast.config import Config
from loopfast.errors import ConfigError
from loopfast.policies import load_family, load_scheduler


def trained_pipeline(config: Config, exported: Path) -> Any:
    """Loads a diffusers pipeline with a run's exported model, on the CPU in ``model.dtype``.

    Args:
        config: the run's configuration.
        exported: the folder of the whole pipeline, or of the LoRA, which is loaded into the base model.

    Raises:
        ConfigError: the folder does not exist, or the base model cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    if not exported.is_dir():
        raise ConfigError(f"{exported} is not there: a run exports its model when it ends")
    dtype = getattr(torch, config.model.dtype)
    if config.model.tune == "full":
        return DiffusionPipeline.from_pretrained(exported, torch_dtype=dtype)
    family = load_family(config.model)
    pipeline = family.policy_class().load_pipeline(config.model, family)
    pipeline.register_modules(scheduler=load_scheduler(config.model))
    pipeline.load_lora_weights(exported)
    return pipeline.to(dtype=dtype)
