"""Weights of rewards, local or on the hub; weights that are missing, or of another model, are errors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopfast.errors import ConfigError, first_line
from loopfast.rewards.base import listed

__all__ = ["Source", "is_file", "renamed", "require_file", "require_folder"]

_MODEL_FILES = ("config.json", "*.safetensors")


@dataclass(frozen=True)
class Source:
    """A model's folder or a file of weights, local or on the hub. Its methods raise a `ConfigError` that names it.

    Attributes:
        reward, key: names of the reward and of its option, for messages.
        name: a local path, or a name on the hub: ``owner/name`` of a model, ``owner/name/file`` of a file.
        revision: branch, tag or commit on the hub.
    """

    reward: str
    key: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"reward {self.reward!r}: {self.key} {self.name!r}"

    def load_model(self, cls: Any, state: Mapping[str, Tensor] | None = None, **options: Any) -> Any:
        """Loads a transformers model of class ``cls``, for scoring only, on the CPU and in the type it was saved in.

        Its weights are safetensors, or with a ``config`` the tensors of ``state``, by the model's names and no others.
        """
        if state is None:
            options |= {"use_safetensors": True, "revision": self.revision}
        else:
            options["state_dict"] = dict(state)
        try:
            model, found = cls.from_pretrained(
                self.name if state is None else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(
                f"{self}: cannot load a {cls.__name__} with safetensors weights: {first_line(error)}"
            ) from error
        for mismatch in sorted(found["mismatched_keys"]):
            if isinstance(mismatch, str):  # transformers 4 gives the name alone
                shape = list(model.state_dict()[mismatch].shape)
                raise ConfigError(f"{self}: {mismatch}: found another shape, expected {shape}")
            name, shape, expected = mismatch
            raise ConfigError(f"{self}: {name}: found shape {list(shape)}, expected {list(expected)}")
        unknown = () if state is None else found["unexpected_keys"]
        _require_same(f"{self} is no {cls.__name__}", found["missing_keys"], unknown)
        return model.eval().requires_grad_(False)

    def load_config(self, cls: Any, what: str = "configuration") -> Any:
        """Loads an object of ``cls``, such as a transformers configuration; ``what`` names it in messages."""
        try:
            return cls.from_pretrained(self.name, revision=self.revision)
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise ConfigError(
                f"reward {self.reward!r}: cannot load the {what} of {self.name!r}: {first_line(error)}"
            ) from error

    def load_tokenizer(self) -> Any:
        """Loads the tokenizer, which must have words."""
        from transformers import AutoTokenizer

        tokenizer = self.load_config(AutoTokenizer, "tokenizer")
        # without its files, transformers makes an empty one from the name of the model's class
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ConfigError(
                f"reward {self.reward!r}: cannot load the tokenizer of {self.name!r}: it has no vocabulary"
            )
        return tokenizer

    def read_state(self) -> dict[str, Tensor]:
        """Reads the tensors of a file by name, on the CPU: of ``.safetensors``, or of ``torch.save``.

        The second is read with ``weights_only``, so that no code of the file runs. A dictionary under ``state_dict`` or
        ``model`` is taken for the whole.
        """
        try:
            path = self._downloaded()
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
            found = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ConfigError(f"{self} cannot be read: {first_line(error)}") from error
        except (pickle.UnpicklingError, ValueError, RuntimeError, EOFError) as error:
            raise ConfigError(f"{self} is no file of weights: {first_line(error)}") from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ConfigError(f"{self} is no safetensors file: {first_line(error)}") from error
        for name in ("state_dict", "model"):
            if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
                found = found[name]
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ConfigError(f"{self} is no state dict: expected tensors by name")
        return dict(found)

    def _downloaded(self) -> Path:
        if _is_local(self.name):
            return Path(self.name)
        from huggingface_hub import hf_hub_download

        owner, name, file = self.name.split("/", 2)
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=self.revision))

    def fill(self, module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Puts tensors of this file, which must be exactly the module's, into it; returns it for scoring only."""
        expected = module.state_dict()
        _require_same(
            f"{self} does not hold the weights of {type(module).__name__}",
            expected.keys() - state.keys(),
            state.keys() - expected.keys(),
        )
        for name, value in expected.items():
            if state[name].shape != value.shape:
                raise ConfigError(
                    f"{self}: {name}: found shape {list(state[name].shape)}, expected {list(value.shape)}"
                )
        module.load_state_dict(dict(state))
        return module.eval().requires_grad_(False)


def _require_same(wrong: str, missing: Collection[str], unknown: Collection[str]) -> None:
    parts = [f"without {listed(sorted(missing))}"] if missing else []
    parts += [f"with {listed(sorted(unknown))}, which it does not have"] if unknown else []
    if parts:
        raise ConfigError(f"{wrong}: {'; '.join(parts)}")


def renamed(name: str, names: Iterable[tuple[str, str]]) -> str:
    """Replaces a weight's name by each pair of pattern and replacement whose pattern is the whole name, in turn."""
    for pattern, replacement in names:
        name = re.sub(rf"^(?:{pattern})$", replacement, name)
    return name


def _is_local(source: str) -> bool:
    """True if ``source`` is a path, which exists or is written as one, and not a hub's ``owner/name``."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or "\\" in source


def is_file(source: str) -> bool:
    """True if ``source`` is a local file or one on the hub (``owner/name/file``), and not a model's folder or name."""
    if _is_local(source):
        return not Path(source).expanduser().is_dir()
    return source.count("/") > 1


def require_folder(
    reward: str, key: str, source: str, revision: str | None = None, files: Collection[str] = _MODEL_FILES
) -> Source:
    """Returns the source of a model: a local folder with ``files``, or a hub name, which is not looked up.

    Raises:
        ConfigError: ``source`` is neither a hub name nor a folder with these files.
    """
    problem = None
    if not isinstance(source, str) or not source:
        problem = f"found {source!r}, allowed: a folder or a hub name"
    elif not _is_local(source):
        if source.count("/") > 1:
            problem = f"{source!r} is neither a folder nor a hub name such as owner/name"
    elif not Path(source).expanduser().is_dir():
        problem = f"{source!r} is not there; expected: a folder with a model's files, or a hub name"
    elif missing := [name for name in files if not any(Path(source).expanduser().glob(name))]:
        problem = f"{source!r}: no {', '.join(missing)} in this folder; expected: a transformers model"
    return _source(reward, key, source, revision, problem)


def require_file(reward: str, key: str, source: str, revision: str | None = None) -> Source:
    """Returns the source of a local file, or of ``owner/name/file`` on the hub, which is not looked up.

    Raises:
        ConfigError: ``source`` is neither.
    """
    problem = None
    if not isinstance(source, str) or not source:
        problem = f"found {source!r}, allowed: a file, or owner/name/file on the hub"
    elif _is_local(source):
        if not Path(source).expanduser().is_file():
            problem = f"{source!r} is not there; expected: a file of weights"
    elif source.count("/") < 2:
        problem = f"{source!r} is not there, and is no file on the hub, such as owner/name/file"
    return _source(reward, key, source, revision, problem)


def _source(reward: str, key: str, source: str, revision: str | None, problem: str | None) -> Source:
    if problem:
        raise ConfigError(f"reward {reward!r}: {key}: {problem}")
    name = str(Path(source).expanduser()) if _is_local(source) else source
    return Source(reward, key, name, revision)
