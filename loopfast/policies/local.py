"""Checks of a model on this machine, without its weights and without the hub."""

from __future__ import annotations

from pathlib import Path

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, first_line
from loopfast.policies.families import Family
from loopfast.policies.loading import class_of, load_family, model_index
from loopfast.policies.lora_file import lora_weights
from loopfast.policies.source import local_path, locate
from loopfast.policies.text_limits import TOKENIZERS, TextLimit, encoder_of


def check_model(config: ModelConfig) -> Family | None:
    """Returns the family of a model on this machine; None for a hub name, which is not looked up.

    Raises:
        ConfigError: ``model.pretrained`` or ``model.lora.from`` names a local path with the wrong content.
    """
    start = config.lora.from_
    if start is not None and local_path("model.lora.from", start) is not None:
        lora_weights(config)
    return load_family(config) if isinstance(locate(config), Path) else None


def local_text_limits(config: ModelConfig) -> tuple[TextLimit, ...] | None:
    """Returns the limits of a model's text encoders; None if its tokenizers are not on this machine.

    For a hub name, the tokenizers are those in the hub's cache.

    Raises:
        ConfigError: the model's folder is no pipeline, or its tokenizers cannot be loaded.
    """
    import transformers

    folder = _folder(config)
    if folder is None:
        return None
    described = config.model_copy(update={"pretrained": str(folder), "config": None})
    policy, index = load_family(described).policy_class(), model_index(described)
    tokenizers = {}
    for name in TOKENIZERS:
        kind = class_of(index.get(name))
        if kind is None or class_of(index.get(encoder_of(name))) is None:
            continue
        try:
            tokenizers[name] = getattr(transformers, kind).from_pretrained(
                folder / name, local_files_only=True
            )
        # a damaged file may raise any error of its reader
        except Exception as error:
            if folder != locate(config):
                return None
            raise ConfigError(
                f"model.pretrained: cannot load the {name} of {config.pretrained!r}: {first_line(error)}"
            ) from error
    return policy.limits_of(config, index["_class_name"], tokenizers)


def _folder(config: ModelConfig) -> Path | None:
    """Returns the folder of a model on this machine: its own, or the one in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    source = locate(config)
    if isinstance(source, Path):
        return source
    try:
        found = try_to_load_from_cache(source, "model_index.json", revision=config.revision)
    except ValueError:  # the hub allows no such name
        return None
    return Path(found).parent if isinstance(found, str) else None
