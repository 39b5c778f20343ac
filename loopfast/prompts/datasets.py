"""Reads prompts from a dataset of the library ``datasets``: a name on the Hugging Face hub, or a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopfast.errors import ConfigError, MissingExtraError, first_line
from loopfast.prompts.files import Entry, listed, prompt_key

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["read_dataset"]

_SAVED = ("state.json", "dataset_dict.json")
"""The files that ``save_to_disk`` writes."""

_JSON_TYPES = re.compile(r"(large_)?string|bool|u?int\d+|float\d+")


def read_dataset(name: str) -> list[Entry]:
    """Reads every prompt of a dataset, with the other columns as metadata if JSON can hold them.

    Args:
        name: ``<hub name or folder>`` or ``<hub name or folder>:<split>``; the split is ``train`` by default. The
            folder was written by ``save_to_disk``, or has files that ``datasets.load_dataset`` reads.

    Raises:
        ConfigError: the dataset cannot be loaded, has no such split, or no column ``prompt`` or ``text``.
        MissingExtraError: the library is not installed.
    """
    where, split = _parts(name)
    dataset = _load(where, split)
    key = prompt_key(dataset.column_names)
    if key is None:
        raise ConfigError(f"no column is named prompt or text; found: {listed(dataset.column_names)}")
    columns = [column for column, kind in dataset.features.items() if _is_json(kind)]
    if key not in columns:
        raise ConfigError(f"the column {key!r} does not hold texts")
    entries = []
    for number, row in enumerate(dataset.select_columns(columns).to_list(), start=1):
        text = row.pop(key)
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"row {number}: {key} is {text!r}; allowed: a text")
        entries.append(Entry(f"row {number}", text or "", row))
    return entries


def _parts(name: str) -> tuple[str, str | None]:
    """The hub name or folder, and the split, or None if the name has none."""
    if name and (":" not in name or Path(name).expanduser().is_dir()):
        return name, None
    where, _, split = name.rpartition(":")
    if not where or not split:
        raise ConfigError("allowed: datasets:<hub name or folder> or datasets:<hub name or folder>:<split>")
    return where, split


def _load(where: str, split: str | None) -> Dataset:
    try:
        from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk
        from huggingface_hub.utils.logging import set_verbosity_error
    except ImportError as error:
        raise MissingExtraError(f"prompts 'datasets:{where}'", "datasets", error.name) from error
    # no line for each try to reach the hub; one error at the end is enough
    disable_progress_bars()
    set_verbosity_error()
    folder = Path(where).expanduser().resolve()
    if not folder.is_dir() and where.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"there is no folder {where!r}")
    try:
        if any((folder / file).is_file() for file in _SAVED):
            found: Any = load_from_disk(str(folder))
        else:
            found = load_dataset(str(folder) if folder.is_dir() else where, split=split or "train")
    # readers of files, the network and the hub raise errors of many kinds
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise ConfigError(f"cannot be loaded: {reason}") from error
    if isinstance(found, DatasetDict):
        split = split or "train"
        if split not in found:
            raise ConfigError(f"there is no split {split!r}; found: {', '.join(map(repr, found))}")
        return found[split]
    if split is not None and found.split != split:
        raise ConfigError(f"there is no split {split!r}; the folder holds one dataset: leave the split out")
    return found


def _is_json(kind: Any) -> bool:
    """Returns whether JSON can hold the values of a column of this kind, which excludes images and times."""
    if isinstance(kind, dict):
        return all(map(_is_json, kind.values()))
    if isinstance(kind, list):
        return all(map(_is_json, kind))
    if hasattr(kind, "feature"):
        return _is_json(kind.feature)
    if type(kind).__name__ in ("Value", "ClassLabel"):
        return _JSON_TYPES.fullmatch(kind.dtype) is not None
    return type(kind).__name__ == "Json"
