"""What rewards with weights share: where these lie, reading them, and calling the model batch by batch."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopfast.errors import ConfigError, first_line
from loopfast.policies import pad_rows
from loopfast.rewards.fitting import ImagesPerCall, RewardMemoryError, shortage
from loopfast.system.device import torch_device
from loopfast.system.memory import is_out_of_memory, to_device

__all__ = [
    "Placement",
    "PretrainedReward",
    "ScoreBatch",
    "is_file",
    "is_local",
    "load_config",
    "load_converted",
    "load_pretrained",
    "load_state",
    "load_tokenizer",
    "number",
    "placement",
    "read_state",
    "require_file",
    "require_folder",
]

ScoreBatch = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]
"""Gives the scores ``[B]`` of images ``[B, 3, H, W]``, float32 in [0, 1] on the reward's device."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KEYS_SHOWN = 3
_MODEL_FILES = ("config.json", "*.safetensors")


@dataclass(frozen=True)
class Placement:
    """Where and how a reward's model computes.

    Attributes:
        reward: name of the reward, for messages.
        device: of the model; a GPU by its number, as threads differ in which is the current one.
        dtype: of the model's weights and activations.
        batch_size: images per model call, as long as they fit into memory.
    """

    reward: str
    device: torch.device
    dtype: torch.dtype
    batch_size: int


def placement(reward: str, device: str, dtype: str, batch_size: int) -> Placement:
    """The options that every reward with weights has, checked.

    Args:
        reward: its name.
        device: ``auto`` (cuda where there is one, else cpu), ``cpu``, ``cuda`` (the current GPU) or ``cuda:N``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        batch_size: images per model call, at least 1.

    Raises:
        ConfigError: an option has another value, or there is no such device on this machine.
    """
    key = f"reward {reward!r}: "
    if dtype not in _DTYPES:
        raise ConfigError(f"{key}dtype: found {dtype!r}, allowed: {', '.join(_DTYPES)}")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"{key}batch_size: found {batch_size!r}, allowed: a whole number, at least 1")
    kind, _, index = str(device).partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ConfigError(f"{key}device: found {device!r}, allowed: auto, cpu, cuda or cuda:N")
    place = torch_device(device, key=f"{key}device")
    if place == torch.device("cuda"):
        # before CUDA has started, which asking would do, it is the first one
        place = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    return Placement(reward, place, _DTYPES[dtype], batch_size)


def number(reward: str, key: str, value: float) -> float:
    """An option that is a finite number.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"reward {reward!r}: {key}: found {value!r}, allowed: a finite number")
    return float(value)


class PretrainedReward:
    """A reward that reads its weights once, when `load` is called, at the latest when it first scores.

    Every model call has `Placement.batch_size` rows, the last of a batch filled up with copies: how many others are
    scored with it then changes an image's score by rounding at most. After a call that ran out of memory, calls have
    half as many.

    Args:
        place: where and how it computes.
        load: reads the weights and gives what scores as many images as it is called with.
    """

    def __init__(self, place: Placement, load: Callable[[], ScoreBatch]) -> None:
        self.place = place
        self._load = load
        self._score: ScoreBatch | None = None
        self._lock = threading.Lock()
        self._calls = ImagesPerCall(
            place.reward, place.batch_size, advice="its options dtype=float16 and a smaller batch_size, "
        )

    def load(self) -> None:
        """Reads the weights; nothing the second time.

        Raises:
            ConfigError: they cannot be found or are not those of the expected model.
            RewardMemoryError: they do not fit into a GPU's memory.
        """
        self._ready()

    def _ready(self) -> ScoreBatch:
        with self._lock:
            if self._score is None:
                self._score = self._read()
            return self._score

    def _read(self) -> ScoreBatch:
        try:
            return self._load()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RewardMemoryError(
                f"reward {self.place.reward!r}: its weights do not fit into the memory of {self.place.device} "
                f"({shortage(error)}); its options dtype=float16 or device make room"
            ) from error

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores float32 ``[N]`` on the CPU; see `loopfast.rewards.base.Reward`."""
        score = self._ready()
        place = self.place

        def attempt(size: int) -> Tensor:
            parts = []
            for start in range(0, len(prompts), size):
                rows = slice(start, start + size)
                texts, entries = prompts[rows], metadata[rows]
                missing = size - len(texts)
                batch = pad_rows(to_device(images[rows], place.device, torch.float32), size)
                found = score(batch, texts + texts[:1] * missing, entries + entries[:1] * missing)
                parts.append(found[: len(texts)].float())
            return torch.cat(parts).cpu() if parts else torch.zeros(0)

        return self._calls.with_oom_fallback(len(prompts), place.device, attempt)


def is_local(source: str) -> bool:
    """Whether ``source`` is a path rather than a hub's ``owner/name``: it exists, or is written as a path."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or "\\" in source


def is_file(source: str) -> bool:
    """Whether ``source`` is a file, there or on the hub (``owner/name/file``), rather than a model's folder or name."""
    if is_local(source):
        return not Path(source).expanduser().is_dir()
    return source.count("/") > 1


def require_folder(reward: str, key: str, source: str, *files: str) -> str:
    """A local folder of a model as a path, or a hub name as it is, which is not looked up.

    Args:
        reward: name of the reward, for messages.
        key: name of its option, for messages.
        source: the option's value.
        files: what must be in a local folder; default: ``config.json`` and weights as safetensors.

    Raises:
        ConfigError: it is neither a hub name nor a folder with these files.
    """
    where = f"reward {reward!r}: {key}: {source!r}"
    if not isinstance(source, str) or not source:
        raise ConfigError(f"reward {reward!r}: {key}: found {source!r}, allowed: a folder or a hub name")
    if not is_local(source):
        if len(source.split("/")) > 2:
            raise ConfigError(f"{where} is neither a folder nor a hub name such as owner/name")
        return source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{where} is not there; expected: a folder with a model's files, or a hub name")
    missing = [name for name in files or _MODEL_FILES if not any(folder.glob(name))]
    if missing:
        raise ConfigError(f"{where}: no {', '.join(missing)} in this folder; expected: a transformers model")
    return str(folder)


def require_file(reward: str, key: str, source: str) -> str:
    """A local file as a path, or a file on the hub, ``owner/name/file``, as it is, which is not looked up.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(source, str) or not source:
        raise ConfigError(
            f"reward {reward!r}: {key}: found {source!r}, allowed: a file, or owner/name/file on the hub"
        )
    if is_local(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"reward {reward!r}: {key}: {source!r} is not there; expected: a file of weights"
            )
        return str(path)
    if len(source.split("/")) < 3:
        raise ConfigError(
            f"reward {reward!r}: {key}: {source!r} is not there, and is no file on the hub, such as owner/name/file"
        )
    return source


def load_pretrained(
    reward: str, cls: Any, weights: str, *, revision: str | None = None, **options: Any
) -> Any:
    """A transformers model with its published weights, for scoring only.

    Args:
        reward: name of the reward, for messages.
        cls: class of the model.
        weights: a folder or a hub name; its weights must be safetensors.
        revision: branch, tag or commit on the hub.
        options: further arguments of ``cls.from_pretrained``.

    Returns:
        The model in evaluation mode, without gradients, on the CPU in the type it was saved in.

    Raises:
        ConfigError: it cannot be found or read, or it is another model: a weight is missing or has another shape.
    """
    return _loaded(
        reward, cls, weights, weights, revision=revision, use_safetensors=True, partial=True, **options
    )


def load_converted(
    reward: str, cls: Any, config: Any, source: str, state: Mapping[str, Tensor], **options: Any
) -> Any:
    """A transformers model with weights that were published under other names, for scoring only.

    Args:
        reward: name of the reward, for messages.
        cls: class of the model.
        config: its configuration.
        source: where the weights come from, for messages.
        state: tensors by the model's own names; nothing may be left over.
        options: further arguments of ``cls.from_pretrained``.

    Returns:
        As `load_pretrained`.

    Raises:
        ConfigError: a weight is missing, is left over, or has another shape.
    """
    return _loaded(reward, cls, source, None, config=config, state_dict=dict(state), partial=False, **options)


def _loaded(reward: str, cls: Any, source: str, folder: str | None, *, partial: bool, **options: Any) -> Any:
    """What ``cls.from_pretrained`` gives, if every weight was there (and no other, unless ``partial``)."""
    where = f"reward {reward!r}: weights {source!r}"
    try:
        model, found = cls.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{where}: cannot load a {cls.__name__} with safetensors weights: {first_line(error)}"
        ) from error
    for mismatch in sorted(found["mismatched_keys"]):
        if isinstance(mismatch, str):  # transformers 4 gives the name alone
            shape = list(model.state_dict()[mismatch].shape)
            raise ConfigError(f"{where}: {mismatch}: found another shape, expected {shape}")
        name, there, expected = mismatch
        raise ConfigError(f"{where}: {name}: found shape {list(there)}, expected {list(expected)}")
    unknown = () if partial else found["unexpected_keys"]
    _require_same(f"{where} is no {cls.__name__}", found["missing_keys"], unknown)
    return _frozen(model)


def _require_same(wrong: str, missing: Collection[str], unknown: Collection[str]) -> None:
    parts = [f"without {_some(missing)}"] if missing else []
    parts += [f"with {_some(unknown)}, which it does not have"] if unknown else []
    if parts:
        raise ConfigError(f"{wrong}: {'; '.join(parts)}")


def load_config(reward: str, cls: Any, source: str, *, revision: str | None = None) -> Any:
    """A transformers configuration of class ``cls`` from a folder or a hub name.

    Raises:
        ConfigError: it cannot be found or read.
    """
    return _from_pretrained(reward, "configuration", cls, source, revision)


def load_tokenizer(reward: str, source: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or a hub name.

    Raises:
        ConfigError: it cannot be found or read, or it has no words.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(reward, "tokenizer", AutoTokenizer, source, revision)
    # where its files are missing, the name of the model's class is enough for transformers
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f"reward {reward!r}: cannot load the tokenizer of {source!r}: it has no vocabulary")
    return tokenizer


def _from_pretrained(reward: str, what: str, cls: Any, source: str, revision: str | None) -> Any:
    try:
        return cls.from_pretrained(source, revision=revision)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(
            f"reward {reward!r}: cannot load the {what} of {source!r}: {first_line(error)}"
        ) from error


def read_state(reward: str, key: str, source: str, *, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, on the CPU.

    Args:
        reward: name of the reward, for messages.
        key: name of the option, for messages.
        source: a local file, or ``owner/name/file`` on the hub. ``.safetensors``, or what ``torch.save`` wrote: that
            is read with ``weights_only``, so no code of the file runs. A dictionary in its ``state_dict`` or ``model``
            is taken for the whole.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigError: there is no such file, or it holds anything but tensors.
    """
    where = f"reward {reward!r}: {key} {source!r}"
    try:
        path = _download(source, revision)
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


def _download(source: str, revision: str | None) -> Path:
    """The file itself, from the hub where it is not local."""
    if is_local(source):
        return Path(source).expanduser()
    from huggingface_hub import hf_hub_download

    owner, name, file = source.split("/", 2)
    return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))


def load_state(
    reward: str, key: str, source: str, module: nn.Module, state: Mapping[str, Tensor]
) -> nn.Module:
    """The module with the tensors of ``state``, which must be exactly its own, for scoring only.

    Args:
        reward: name of the reward, for messages.
        key: name of the option, for messages.
        source: where the tensors come from, for messages.
        module: what they belong to.
        state: tensors by the module's names.

    Raises:
        ConfigError: names are missing or left over, or a shape differs.
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
    return _frozen(module)


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _some(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _KEYS_SHOWN
    return ", ".join(ordered[:_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
