"""Sources of prompts: the embedded world, T2I-CompBench, a file, a dataset, or the user's own function."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopfast.embedded import world
from loopfast.errors import ConfigError
from loopfast.prompts.datasets import read_dataset
from loopfast.prompts.files import Entry, read_prompt_file
from loopfast.prompts.t2i_compbench import CATEGORIES, read_category
from loopfast.system.plugins import import_function, is_reference, reference_of_path

__all__ = ["Prompt", "PromptList", "load_prompts"]

_ALLOWED = (
    "a file (.txt with a prompt a line, .jsonl, .json, .csv, .tsv), datasets:<name or folder>, module:function, "
    "embedded:<category>, t2i-compbench:<folder>:<category>"
)
# Hangul's fillers and the blank of Braille, which are letters and a symbol in Unicode but show nothing.
_BLANK = "\u115f\u1160\u3164\uffa0\u2800"


@dataclass(frozen=True)
class Prompt:
    """A prompt, with metadata that a reward may need.

    ``metadata["category"]``, if it exists, groups prompts in evaluations and reports.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class PromptList(list[Prompt]):
    """The prompts of a source, in the source's order, with their places and the number of skipped ones.

    Args:
        prompts: the prompts to use. A prompt that occurs twice is drawn twice as often.
        places: each prompt's place in the source, such as ``line 3``; empty if the source has no such places.
        comments: the number of skipped comment lines.
        invisible: the number of skipped prompts that show nothing.
    """

    def __init__(
        self, prompts: Iterable[Prompt], places: Sequence[str] = (), comments: int = 0, invisible: int = 0
    ) -> None:
        super().__init__(prompts)
        self._places, self.comments, self.invisible = places, comments, invisible

    @property
    def repeated(self) -> int:
        """The number of prompts that repeat an earlier one."""
        return len(self) - len({prompt.text for prompt in self})

    def place(self, index: int) -> str:
        """A prompt's place in its source."""
        return self._places[index] if self._places else f"prompt {index + 1}"

    def summary(self) -> str:
        """The numbers of prompts, of repeated prompts and of skipped lines, in words."""
        skipped = [
            f"{count} {what}{'' if count == 1 else 's'}"
            for count, what in ((self.comments, "comment line"), (self.invisible, "invisible prompt"))
            if count
        ]
        notes = [f"{self.repeated} of them repeated"] if self.repeated else []
        notes += [f"skipped: {', '.join(skipped)}"] if skipped else []
        return f"{len(self)} prompt{'' if len(self) == 1 else 's'}" + (
            f" ({'; '.join(notes)})" if notes else ""
        )


def load_prompts(source: str) -> PromptList:
    """Loads every prompt of a source, in the source's order, without surrounding white space.

    Args:
        source: one of

            * ``embedded:<category>`` or ``embedded:<category>-heldout``: prompts of the embedded world;
              categories are ``color``, ``shape``, ``texture``, ``spatial``, ``numeracy``, ``complex``, ``all``;
            * ``t2i-compbench:<folder>:<category>`` or ``t2i-compbench:<folder>:<category>-val``: the training or the
              evaluation prompts of T2I-CompBench, from the benchmark's own files in a folder; see
              `loopfast.prompts.t2i_compbench`;
            * ``datasets:<name or folder>`` or ``datasets:<name or folder>:<split>``: see `loopfast.prompts.datasets`;
            * the path of a file, which may begin with ``~``; see `loopfast.prompts.files`;
            * ``module:function``: a function without arguments that returns texts or `Prompt`\\ s. Modules in
              the current directory can be imported.

    Raises:
        ConfigError: the source does not exist, cannot be read, or holds no prompt.
        MissingExtraError: the source is a dataset, and the library ``datasets`` is not installed.
    """
    scheme, _, name = source.partition(":")
    path = _path(source)
    file = path if path is not None and path.is_file() else None
    if scheme not in _SCHEMES and file is None and is_reference(source):
        prompts = PromptList(_from_function(source))
    else:
        try:
            if scheme in _SCHEMES:
                prompts = _SCHEMES[scheme](name)
            elif file is not None:
                prompts = _checked(*read_prompt_file(file))
            else:
                raise ConfigError(_absent(source, path))
        except ConfigError as error:
            raise ConfigError(f"prompts {source!r}: {error}") from None
    if not prompts:
        skipped = f"; {prompts.summary()}" if prompts.comments or prompts.invisible else ""
        raise ConfigError(f"prompts {source!r}: there is no prompt in it{skipped}")
    return prompts


def _path(source: str) -> Path | None:
    """The source as a path, or None if the system cannot look it up."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError):
        return None
    return path


def _absent(source: str, path: Path | None) -> str:
    """The error about a source of no known kind."""
    if path is not None and path.is_dir():
        return f"is a folder; expected: a file in it, or datasets:{source} for a folder of datasets"
    if advice := reference_of_path(source):
        return advice
    return f"no such file; allowed: {_ALLOWED}"


def _visible(text: str) -> bool:
    """Returns whether a text has a character that is visible by itself: no space, control character or mark."""
    return any(
        unicodedata.category(character) not in ("Cc", "Cf") and unicodedata.category(character)[0] not in "ZM"
        for character in text
        if character not in _BLANK
    )


def _checked(entries: Iterable[Entry], comments: int = 0) -> PromptList:
    """Checks the prompts of a file or a dataset, and skips the invisible ones."""
    found, places, invisible = [], [], 0
    for entry in entries:
        _refuse_characters(entry.place, entry.text)
        if _visible(entry.text):
            found.append(Prompt(entry.text.strip(), entry.metadata))
            places.append(entry.place)
        else:
            invisible += 1
    return PromptList(found, places, comments, invisible)


def _refuse_characters(place: str, text: str) -> None:
    """Raises `ConfigError` if a text holds a character that no tokenizer or file accepts."""
    if "\0" in text:
        raise ConfigError(f"{place} holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{place} holds half of a surrogate pair")


def _from_embedded_world(name: str) -> PromptList:
    category, _, split = name.partition("-")
    try:
        captions = world.prompts(category, split or "train")
    except ValueError:
        known = ", ".join((*world.CATEGORIES, "all"))
        raise ConfigError(
            f"no category {name!r}; allowed: {known}, each also with -validation or -heldout"
        ) from None
    return PromptList(Prompt(caption.text, {"category": caption.category}) for caption in captions)


def _from_t2i_compbench(name: str) -> PromptList:
    directory, _, category = name.rpartition(":")
    category, _, split = category.partition("-")
    if not directory or category not in CATEGORIES or split not in ("", "val"):
        known = ", ".join(CATEGORIES)
        raise ConfigError(
            f"allowed: t2i-compbench:<folder>:<category> with a category of {known}, each also with -val"
        )
    return PromptList(
        Prompt(p.text, {"category": category} | ({"aspects": list(p.aspects)} if p.aspects else {}))
        for p in read_category(Path(directory), category, split or "train")
    )


_SCHEMES: dict[str, Callable[[str], PromptList]] = {
    "embedded": _from_embedded_world,
    "t2i-compbench": _from_t2i_compbench,
    "datasets": lambda name: _checked(read_dataset(name)),
}


def _from_function(source: str) -> list[Prompt]:
    function, name = import_function(source), f"prompts {source!r}"
    try:
        found = function()
        items = list(found) if isinstance(found, Iterable) and not isinstance(found, str | Mapping) else None
    except Exception as error:
        raise ConfigError(f"{name}: raised {type(error).__name__}: {error}") from error
    if items is None:
        raise ConfigError(f"{name}: returned {type(found).__name__}; allowed: a list of texts or Prompts")
    return as_prompts(name, items)


def as_prompts(name: str, items: Iterable[object]) -> list[Prompt]:
    """Makes prompts from the texts or `Prompt`\\ s of a program.

    Raises:
        ConfigError: an item is neither, or shows nothing; the message begins with ``name``.
    """
    prompts = []
    for index, item in enumerate(items):
        prompt = Prompt(item) if isinstance(item, str) else item
        if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
            raise ConfigError(f"{name}: item {index} is {type(item).__name__}; allowed: text or a Prompt")
        if not _visible(prompt.text):
            raise ConfigError(f"{name}: item {index} is empty")
        _refuse_characters(f"{name}: item {index}", prompt.text)
        prompts.append(prompt)
    return prompts
