"""Reads models and weights for rewards; weights that are missing, or of another model, are errors."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopfast.errors import ConfigError, first_line
from loopfast.rewards.models.sources import download

__all__ = ["load_config", "load_pretrained", "load_state", "load_tokenizer", "read_state"]

_KEYS_SHOWN = 3


def load_pretrained(
    reward: str, cls: Any, weights: str, *, state: Mapping[str, Tensor] | None = None, **options: Any
) -> Any:
    """Loads a transformers model for scoring only.

    Args:
        reward: name of the reward, for messages.
        cls: class of the model.
        weights: a folder or a hub name, whose weights must be safetensors; with ``state`` their origin, for messages.
        state: tensors by the model's own names, and no others, in place of published weights.
        options: further arguments of ``cls.from_pretrained``, such as ``revision``, or ``config`` with ``state``.

    Returns:
        The model in evaluation mode, without gradients, on the CPU in the type it was saved in.

    Raises:
        ConfigError: it cannot be found or read, or it is another model: a weight is missing or has another shape.
    """
    where = f"reward {reward!r}: weights {weights!r}"
    options |= {"use_safetensors": True} if state is None else {"state_dict": dict(state)}
    try:
        model, found = cls.from_pretrained(
            weights if state is None else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{where}: cannot load a {cls.__name__} with safetensors weights: {first_line(error)}"
        ) from error
    for mismatch in sorted(found["mismatched_keys"]):
        if isinstance(mismatch, str):  # transformers 4 gives the name alone
            shape = list(model.state_dict()[mismatch].shape)
            raise ConfigError(f"{where}: {mismatch}: found another shape, expected {shape}")
        name, shape, expected = mismatch
        raise ConfigError(f"{where}: {name}: found shape {list(shape)}, expected {list(expected)}")
    unknown = () if state is None else found["unexpected_keys"]
    _require_same(f"{where} is no {cls.__name__}", found["missing_keys"], unknown)
    return model.eval().requires_grad_(False)


def load_config(
    reward: str, cls: Any, source: str, *, revision: str | None = None, what: str = "configuration"
) -> Any:
    """Loads an object of ``cls``, such as a transformers configuration, from a folder or a hub name.

    Raises:
        ConfigError: it cannot be found or read; the message names it by ``what``.
    """
    try:
        return cls.from_pretrained(source, revision=revision)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(
            f"reward {reward!r}: cannot load the {what} of {source!r}: {first_line(error)}"
        ) from error


def load_tokenizer(reward: str, source: str, *, revision: str | None = None) -> Any:
    """Loads the tokenizer of a folder or a hub name.

    Raises:
        ConfigError: it cannot be found or read, or it has no words.
    """
    from transformers import AutoTokenizer

    tokenizer = load_config(reward, AutoTokenizer, source, revision=revision, what="tokenizer")
    # without its files, transformers makes an empty one from the name of the model's class
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f"reward {reward!r}: cannot load the tokenizer of {source!r}: it has no vocabulary")
    return tokenizer


def read_state(reward: str, key: str, source: str, *, revision: str | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a file of weights by name, on the CPU.

    Args:
        reward: name of the reward, for messages.
        key: name of the option, for messages.
        source: a local file, or ``owner/name/file`` on the hub: ``.safetensors``, or a file of ``torch.save``, which is
            read with ``weights_only``, so that no code of the file runs. A dictionary under ``state_dict`` or ``model``
            is taken for the whole.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigError: the file does not exist, or holds anything but tensors.
    """
    where = f"reward {reward!r}: {key} {source!r}"
    try:
        path = download(source, revision)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {first_line(error)}") from error
    except (pickle.UnpicklingError, ValueError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{where} is no file of weights: {first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ConfigError(f"{where} is no safetensors file: {first_line(error)}") from error
    for name in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{where} is no state dict: expected tensors by name")
    return dict(found)


def load_state(
    reward: str, key: str, source: str, module: nn.Module, state: Mapping[str, Tensor]
) -> nn.Module:
    """Puts the tensors of ``state``, which must be exactly the module's own, into it, and returns it for scoring only.

    Args:
        reward: name of the reward, for messages.
        key: name of the option, for messages.
        source: origin of the tensors, for messages.
        module: the module.
        state: tensors by the module's names.

    Raises:
        ConfigError: names are missing or not the module's, or a shape differs.
    """
    where = f"reward {reward!r}: {key} {source!r}"
    expected = module.state_dict()
    _require_same(
        f"{where} does not hold the weights of {type(module).__name__}",
        expected.keys() - state.keys(),
        state.keys() - expected.keys(),
    )
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ConfigError(
                f"{where}: {name}: found shape {list(state[name].shape)}, expected {list(value.shape)}"
            )
    module.load_state_dict(dict(state))
    return module.eval().requires_grad_(False)


def _require_same(wrong: str, missing: Collection[str], unknown: Collection[str]) -> None:
    parts = [f"without {_some(missing)}"] if missing else []
    parts += [f"with {_some(unknown)}, which it does not have"] if unknown else []
    if parts:
        raise ConfigError(f"{wrong}: {'; '.join(parts)}")


def _some(names: Collection[str]) -> str:
    """Lists the first names, and how many more there are."""
    more = len(names) - _KEYS_SHOWN
    return ", ".join(sorted(names)[:_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
