"""Loads a run's exported model for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies import load_family, load_scheduler


def trained_pipeline(model: ModelConfig, exported: Path) -> Any:
    """Loads the model that a run has exported as a diffusers pipeline, on the CPU in ``model.dtype``.

    Args:
        model: the run's section ``model``.
        exported: the folder of the whole pipeline, or of the LoRA, which is loaded into the base model.

    Raises:
        ConfigError: the run has exported nothing yet, or the base model cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    if not exported.is_dir():
        raise ConfigError(f"{exported} is not there: a run exports its model when it ends")
    dtype = getattr(torch, model.dtype)
    if model.tune == "full":
        return DiffusionPipeline.from_pretrained(exported, torch_dtype=dtype)
    family = load_family(model)
    pipeline = family.policy_class().load_pipeline(model, family)
    pipeline.register_modules(scheduler=load_scheduler(model))
    pipeline.load_lora_weights(exported)
    return pipeline.to(dtype=dtype)
