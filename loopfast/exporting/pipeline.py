"""A diffusers pipeline with what a run has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loopfast.config import Config
from loopfast.errors import ConfigError
from loopfast.policies import load_family, load_scheduler


def trained_pipeline(config: Config, exported: Path) -> Any:
    """A diffusers pipeline with what a run has exported, on the CPU in ``model.dtype``.

    Args:
        config: the run.
        exported: the folder of the whole pipeline, or of the LoRA, which goes into the base model then.

    Raises:
        ConfigError: there is nothing yet, or the base model cannot be loaded.
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
