"""The limits of a model's text encoders, found without its weights and without the hub."""

from __future__ import annotations

from pathlib import Path

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, first_line
from loopfast.policies.loading import load_family
from loopfast.policies.source import locate
from loopfast.policies.text_limits import TOKENIZERS, TextLimit, encoder_of


def local_text_limits(config: ModelConfig) -> tuple[TextLimit, ...] | None:
    """Returns the limits of a model's text encoders, from its tokenizers alone.

    The hub is not asked: for a hub name, the tokenizers are those in the hub's cache.

    Returns:
        The limits; None if the model's tokenizers are not on this machine.

    Raises:
        ConfigError: the model's folder is no pipeline, or its tokenizers cannot be loaded.
    """
    import transformers
    from diffusers import DiffusionPipeline

    folder = _folder(config)
    if folder is None:
        return None
    policy = load_family(config.model_copy(update={"pretrained": str(folder), "config": None})).policy_class()
    index = DiffusionPipeline.load_config(str(folder))
    tokenizers = {}
    for name in TOKENIZERS:
        _, kind = index.get(name) or (None, None)
        _, encoder = index.get(encoder_of(name)) or (None, None)
        if kind is None or encoder is None:
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
