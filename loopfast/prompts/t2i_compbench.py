"""Reads the prompt files of T2I-CompBench, as its authors publish them.

Huang et al., *T2I-CompBench++: An Enhanced and Comprehensive Benchmark for Compositional Text-to-image Generation*
(arXiv 2307.06350). A folder has text files ``<category>_<split>.txt`` with one prompt per line: 700 prompts to train on
and 300 to evaluate on in each of eight categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loopfast.errors import ConfigError
from loopfast.prompts.files import read_lines

__all__ = ["CATEGORIES", "SPLITS", "BenchmarkPrompt", "read_category"]

CATEGORIES: tuple[str, ...] = (
    "color",
    "shape",
    "texture",
    "spatial",
    "3d_spatial",
    "numeracy",
    "non_spatial",
    "complex",
)
"""The categories in the order of the paper's tables."""

SPLITS: tuple[str, ...] = ("train", "val")

# The lists of the category complex, by the last part of their names, and the aspects of the prompts in them.
_ASPECTS: dict[str, tuple[str, ...]] = {
    "spatial": ("attribute", "spatial"),
    "action": ("attribute", "action"),
    "spatialaction": ("attribute", "spatial", "action"),
}


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt, and for ``complex`` its aspects (attribute, spatial, action) if the files list them."""

    text: str
    aspects: tuple[str, ...] | None = None


def read_category(directory: Path, category: str, split: str) -> list[BenchmarkPrompt]:
    """Reads the prompts of one file, in its order, including repeated ones.

    Line ends of all kinds are accepted. Empty lines, a byte order mark and space around a prompt are removed, and inner
    white space becomes one space. With ``complex_<split>.txt`` the benchmark's lists ``complex_<split>_spatial.txt``,
    ``_action.txt`` and ``_spatialaction.txt`` are read if they exist.

    Raises:
        ConfigError: there is no such category, folder or file, or the file is not UTF-8 or holds no prompt.
    """
    if category not in CATEGORIES or split not in SPLITS:
        raise ConfigError(
            f"T2I-CompBench has no category {category!r} with a split {split!r}; allowed: {', '.join(CATEGORIES)}; "
            f"{', '.join(SPLITS)}"
        )
    directory = directory.expanduser()
    if not directory.is_dir():
        raise ConfigError(
            f"T2I-CompBench: there is no folder {str(directory)!r}; expected: the folder of the benchmark's prompt "
            f"files, such as {category}_{split}.txt"
        )
    file = directory / f"{category}_{split}.txt"
    if not file.is_file():
        raise ConfigError(
            f"T2I-CompBench: there is no file {file.name!r} in {str(directory)!r}; expected: the benchmark's prompts "
            f"of the category {category}, one a line"
        )
    texts = _lines(file)
    if not texts:
        raise ConfigError(f"T2I-CompBench: {str(file)!r} holds no prompt")
    aspects = {}
    if category == "complex":
        for name, found in _ASPECTS.items():
            listed = directory / f"complex_{split}_{name}.txt"
            if listed.is_file():
                aspects.update(dict.fromkeys(_lines(listed), found))
    return [BenchmarkPrompt(text, aspects.get(text)) for text in texts]


def _lines(file: Path) -> list[str]:
    try:
        lines = read_lines(file)
    except ConfigError as error:
        raise ConfigError(f"T2I-CompBench: {str(file)!r} {error}") from None
    texts = (" ".join(line.split()) for line in lines)
    return [text for text in texts if text]
