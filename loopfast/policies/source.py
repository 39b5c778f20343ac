"""Finds what ``model.pretrained`` names: a pipeline's folder, one file with a whole model, or a name on the hub."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, as_config_error
from loopfast.policies.single_file import described_by, shapes

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of files that torch's pickle wrote."""
_FILES = (*PICKLED, ".safetensors", ".gguf")
_WEIGHTS = (".safetensors", ".bin")
_VARIANT = re.compile(r"^[^.]+\.([A-Za-z][\w]*)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_SWITCH = (
    "model.allow_pickle: true reads it, and nothing in it but tensors (torch.load with weights_only=True)"
)
_GGUF = "they hold rounded weights that cannot be trained: take the original ones"
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""Names that diffusers gives the file of a LoRA."""


@dataclass(frozen=True)
class Source:
    """The location of a model.

    Attributes:
        pipeline: the folder, or the hub name, with the pipeline's configuration files and, without ``file``, its
            weights.
        file: one file with all weights, in the layout of the model's authors.
    """

    pipeline: Path | str
    file: Path | None = None


def locate(config: ModelConfig) -> Path | str:
    """Returns the folder, or the hub name, of a model's pipeline; see `find_source`."""
    return find_source(config).pipeline


def find_source(config: ModelConfig) -> Source:
    """Returns the location of a model; a local one is checked.

    Raises:
        ConfigError: there is no such folder or file, or it holds something else, which the message names.
    """
    found = _place("model.pretrained", config.pretrained)
    if isinstance(found, Path) and found.is_file():
        _refuse_file(found, config)
        tensors = shapes(found)
        pipeline = described_by(tensors) if config.config is None else _place("model.config", config.config)
        if isinstance(pipeline, Path):
            _require_pipeline("model.config", pipeline)
        if config.variant is not None:
            raise ConfigError(
                f"model.variant: found {config.variant!r}, allowed: null with one file, {found.name!r}"
            )
        return Source(pipeline, found)
    if config.config is not None:
        raise ConfigError(
            f"model.config: found {config.config!r}, allowed: null where model.pretrained is no single file; "
            f"{config.pretrained!r} comes with its own configuration"
        )
    if isinstance(found, Path):
        _require_pipeline("model.pretrained", found)
    return Source(found)


def local_path(key: str, name: str) -> Path | None:
    """Returns the file or folder of a name; None for a name on the hub.

    A name that begins with ``/``, ``./``, ``../`` or ``~``, or ends like a file of weights, is never on the hub.
    ``key`` is the configuration's key, for messages.

    Raises:
        ConfigError: the path does not exist, or the name can be neither a path nor a name on the hub.
    """
    with as_config_error(f"{key}: {name!r} cannot be read", OSError, RuntimeError, ValueError):
        path = Path(name).expanduser()
        if path.exists():
            return path
    link = re.match(r"https?://(?:huggingface\.co/)?([^?#]*)", name)
    if link:
        repository = "/".join(link.group(1).split("/")[:2])
        raise ConfigError(
            f"{key}: {name!r} is a link; a hub name is its owner and name ({repository!r}), and a file is downloaded "
            "first"
        )
    if name.startswith(("/", "./", "../", "~")) or name in (".", "..") or name.endswith(("/", *_FILES)):
        raise ConfigError(f"{key}: no such folder or file: {name!r}{_similar(path)}")
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: {name!r} is neither a folder or file here nor a hub name (OWNER/NAME)")
    return None


def not_on_the_hub(name: str) -> str:
    """Returns an addition to a message about an unknown hub name, which may be meant for a folder."""
    parent = Path(name).parent
    if str(parent) == "." or not parent.is_dir():
        return "; there is no such folder here, either"
    return f"; the folder {str(parent)!r} is here, without {Path(name).name!r} in it{_similar(Path(name))}"


def check_weights(config: ModelConfig, parts: Sequence[str]) -> None:
    """Raises `ConfigError` if a component in ``parts`` has only pickled weights, or only weights of a variant.

    ``model.allow_pickle`` allows the former, and ``model.variant`` the latter.
    """
    source = find_source(config)
    folder = source.pipeline
    if source.file is not None or not isinstance(folder, Path):
        return
    for part in parts:
        names = sorted(entry.name for entry in (folder / part).glob("*") if entry.suffix in _WEIGHTS)
        allowed = [name for name in names if config.allow_pickle or name.endswith(".safetensors")]
        if names and not allowed:
            raise ConfigError(
                f"model.pretrained: the weights in {str(folder / part)!r} are pickled only ({names[0]}), and a pickled "
                f"file can hold a program; {_SWITCH}"
            )
        variants = [found.group(1) for name in allowed if (found := _VARIANT.search(name))]
        if config.variant is None and variants and len(variants) == len(allowed):
            raise ConfigError(
                f"model.variant: found null, allowed: {variants[0]}; {str(folder / part)!r} has {allowed[0]} and no "
                "weights without a variant"
            )


def _kind_of_folder(folder: Path) -> str:
    """Returns what a folder without ``model_index.json`` is, and advice, to follow its name in a message."""
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        return "is an empty folder"
    if "config.yaml" in names and {"checkpoints", "metrics.jsonl"} & set(names):
        return _kind_of_run(folder)
    if is_lora(folder):
        return (
            f"is a LoRA, not a pipeline: set model.lora.from={folder} to go on from it, and model.pretrained to the "
            "model that it was trained on"
        )
    for name in ("config.json", "scheduler_config.json"):
        kind = _class_of(folder / name)
        if kind:
            whole = folder.resolve().parent
            hint = f", which is {str(whole)!r}" if (whole / "model_index.json").is_file() else ""
            return f"is one part of a pipeline, its {kind}: name the folder of the whole pipeline{hint}"
    inner = sorted(file.parent for file in folder.glob("snapshots/*/model_index.json"))
    inner += sorted(file.parent for file in folder.glob("*/model_index.json"))
    if inner:
        return f"is no pipeline, and has one in it: {str(inner[-1])!r}"
    single = [name for name in names if name.endswith((".safetensors", ".ckpt"))]
    if single:
        return f"is a folder of single files: name one of them, such as {str(folder / single[0])!r}"
    if any(name.endswith(".gguf") for name in names):
        return f"is a folder of GGUF files; {_GGUF}"
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"is no diffusers pipeline: there is no model_index.json in it, but {shown}"


def is_lora(folder: Path) -> bool:
    """Returns whether a folder is a LoRA's, as diffusers and peft write them."""
    return any((folder / name).is_file() for name in ("adapter_config.json", *LORA_FILES))


def _place(key: str, name: str) -> Path | str:
    if name == "embedded":
        return Path(str(resources.files("loopfast.embedded") / "model"))
    return local_path(key, name) or name


def _require_pipeline(key: str, folder: Path) -> None:
    with as_config_error(f"{key}: {str(folder)!r} cannot be read", OSError):
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"{key}: {str(folder)!r} {_kind_of_folder(folder)}")


def _kind_of_run(run: Path) -> str:
    if (run / "model" / "model_index.json").is_file():
        return f"is a run's folder; its model is {str(run / 'model')!r}"
    if is_lora(run / "lora"):
        return (
            f"is the folder of a run that trained a LoRA: set model.lora.from={run} to go on from it, and "
            "model.pretrained to the run's own"
        )
    return (
        f"is the folder of a run that is not finished: `loopfast export {run} --to FOLDER` writes its model"
    )


def _class_of(file: Path) -> str:
    """Returns the class that a component's configuration file names, or an empty string."""
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(config, dict):
        return ""
    architectures = config.get("architectures") or [""]
    return str(config.get("_class_name") or architectures[0] or config.get("model_type") or "")


def _refuse_file(file: Path, config: ModelConfig) -> None:
    """Raises `ConfigError` if a file cannot hold a model's weights."""
    name = f"model.pretrained: {str(file)!r}"
    if file.name == "model_index.json":
        raise ConfigError(f"{name} is a part of a pipeline: name its folder, {str(file.parent)!r}")
    if file.suffix == ".gguf":
        raise ConfigError(f"{name} is a GGUF file; {_GGUF}")
    if file.suffix in PICKLED and not config.allow_pickle:
        raise ConfigError(f"{name} is a pickled file, and such a file can hold a program; {_SWITCH}")
    if file.suffix not in _FILES:
        raise ConfigError(
            f"{name} is a file of another kind; allowed: a pipeline's folder, or a .safetensors or .ckpt file"
        )


def _similar(path: Path) -> str:
    """Returns a hint at the file in the same folder whose name is most similar to a missing one."""
    try:
        names = [file.name for file in path.parent.iterdir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, 1)
    return f"; there is {str(path.parent / found[0])!r}" if found else ""
