"""Reads files of prompts; the ending of a file's name selects the form.

`loopfast.prompts.sources` strips, checks and counts the prompts.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopfast.errors import ConfigError

__all__ = ["Entry", "prompt_of", "read_lines", "read_prompt_file"]

KEYS = ("prompt", "text")
"""Names of the column or key with the prompt, in upper or lower case. The first name that exists is used."""

# UTF-32 precedes UTF-16, as its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LINE_END = re.compile(r"\r\n|\r|\n")
_COMMENT = re.compile(r"#+(\s|$)")
_LIST_MARK = re.compile(r"[-*•]\s")
_YAML_KEY = re.compile(r"-\s+(prompt|text)\s*:", re.IGNORECASE)
_COLUMN_NAME = re.compile(r"""["']?\w[\w .-]*["']?""")
_TEXT_HINT = "write one prompt a line in a .txt file"
_JSON_LINES = "JSON lines (an object on each line): name the file .jsonl"
# Endings of files that hold no text, or text of a form that is not read, with advice.
_OTHER_FORMS = {
    **dict.fromkeys((".yaml", ".yml"), ("YAML", f"{_TEXT_HINT}, or a list in a .json file")),
    **dict.fromkeys((".xml", ".html", ".htm"), ("a markup document", _TEXT_HINT)),
    **dict.fromkeys((".parquet", ".arrow"), ("a table of datasets", "name its folder: datasets:<folder>")),
    **dict.fromkeys(
        (".xlsx", ".xls", ".ods", ".docx", ".odt", ".rtf", ".pdf"),
        ("an office document", "save it as .csv or as .txt"),
    ),
    **dict.fromkeys(
        (".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z"),
        ("an archive", "unpack it and name the file"),
    ),
    ".py": ("Python", "name a function in it: <module>:<function>, without .py"),
}


@dataclass(frozen=True)
class Entry:
    """A prompt as it is in a file.

    Attributes:
        place: its place in the file, such as ``line 3``.
        text: the text, which is not stripped yet and may be empty.
        metadata: everything beside the text.
    """

    place: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompt_file(path: Path) -> tuple[list[Entry], int]:
    """Reads every prompt of a file, and counts its comment lines.

    The form is that of the name's ending: ``.jsonl`` or ``.ndjson``, ``.json``, ``.csv``, ``.tsv``. Any other file is
    text with one prompt per line.

    Raises:
        ConfigError: the file cannot be read, has another encoding or form, or is broken. The message does not name the
            file.
    """
    ending = path.suffix.lower()
    if ending in _OTHER_FORMS:
        form, advice = _OTHER_FORMS[ending]
        raise ConfigError(f"a {ending} file is {form}, which is not read as prompts; {advice}")
    text = read_text(path)
    if ending in (".jsonl", ".ndjson"):
        return _json_lines(text), 0
    if ending == ".json":
        return _json(text), 0
    if ending in (".csv", ".tsv"):
        return _table(text, "," if ending == ".csv" else "\t"), 0
    return _text(text)


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a text file, without their ends.

    Raises:
        ConfigError: as for `read_text`.
    """
    return _LINE_END.split(read_text(path))


def read_text(path: Path) -> str:
    r"""Reads a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Byte order marks are removed, also inside the text, where files were joined together.

    Raises:
        ConfigError: the file cannot be read, has another encoding, or holds a NUL character.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "ignore")
        raise ConfigError(
            f"cannot be read: line {_line_after(before)} is not {encoding.upper()} (byte "
            f"0x{data[error.start]:02x}); save the file as UTF-8, for example with "
            "iconv -f <its encoding> -t UTF-8"
        ) from None
    if "\0" in text:
        raise ConfigError(
            f"cannot be read: line {_line_after(text[: text.index(chr(0))])} holds a NUL character; expected: text in "
            "UTF-8, or in UTF-16 with a byte order mark"
        )
    return text.replace("\ufeff", "")


def _line_after(text: str) -> int:
    """The number of the line in which a text ends, from 1."""
    return 1 + len(_LINE_END.findall(text))


def prompt_of(item: Any, place: str) -> Entry:
    """Makes a prompt from a text, or from an object with a key ``prompt`` or ``text`` and metadata in the other keys.

    Raises:
        ConfigError: the item is neither; the message names ``place``.
    """
    if isinstance(item, str):
        return Entry(place, item)
    if not isinstance(item, Mapping):
        raise ConfigError(
            f"{place} is {_kind(item)}; allowed: a text, or an object with a key prompt or text"
        )
    key = prompt_key(list(item))
    if key is None:
        raise ConfigError(f"{place} has no key prompt or text; found: {listed(item)}")
    if not isinstance(item[key], str):
        raise ConfigError(f"{place}: {key} is {_kind(item[key])}; allowed: a text")
    return Entry(place, item[key], {name: value for name, value in item.items() if name != key})


def prompt_key(names: list[Any]) -> str | None:
    """Returns the name of the column or key with the prompt, or None.

    Raises:
        ConfigError: two names qualify, which differ in upper and lower case only.
    """
    for key in KEYS:
        found = [name for name in names if isinstance(name, str) and name.strip().lower() == key]
        if len(found) > 1:
            raise ConfigError(f"{' and '.join(map(repr, found))} both name the prompt; keep one of them")
        if found:
            return found[0]
    return None


def listed(names: Iterable[object]) -> str:
    """Lists names in a message."""
    return ", ".join(map(repr, names)) or "nothing"


def _kind(value: Any) -> str:
    """The kind of a value in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _parsed(text: str) -> Any:
    """Parses a JSON text.

    Raises:
        ConfigError: the text is not JSON, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError("holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}") from None
    return value


def _json_lines(text: str) -> list[Entry]:
    entries = []
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip():
            try:
                item = _parsed(line)
            except ConfigError as error:
                raise ConfigError(f"line {number} {error}; expected: JSON lines, an object on each") from None
            entries.append(prompt_of(item, f"line {number}"))
    return entries


def _json(text: str) -> list[Entry]:
    if not text.strip():
        return []
    try:
        value = _parsed(text)
    except ConfigError as error:
        first = _LINE_END.split(text.strip())[0]
        if _is_json(first, dict):
            raise ConfigError(f"looks like {_JSON_LINES}") from None
        raise ConfigError(f"the file {error}") from None
    if not isinstance(value, list):
        raise ConfigError(
            f"the file holds {_kind(value)}; allowed: a list of texts, or of objects with a key prompt or text"
        )
    return [prompt_of(item, f"item {number}") for number, item in enumerate(value, start=1)]


def _table(text: str, delimiter: str) -> list[Entry]:
    if not text.strip():
        return []
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    entries = []
    try:
        columns = [name.strip() for name in next(rows)]
        key = prompt_key(columns)
        if key is None:
            separator = "commas" if delimiter == "," else "tabs"
            raise ConfigError(
                "no column is named prompt or text; expected: names of columns in the first line, separated by "
                f"{separator}; found: {listed(columns)}"
            )
        for row in rows:
            if not row:
                continue
            place = f"line {rows.line_num}"
            if len(row) != len(columns):
                raise ConfigError(
                    f"{place} has {len(row)} field(s), but the first line names {len(columns)}; a text that holds the "
                    'separator needs quotation marks ("...")'
                )
            fields = dict(zip(columns, row, strict=True))
            prompt = fields.pop(key)
            entries.append(
                Entry(place, prompt, {name: value for name, value in fields.items() if name and value})
            )
    except csv.Error as error:
        raise ConfigError(f"line {rows.line_num} is broken: {error}") from None
    return entries


def _text(text: str) -> tuple[list[Entry], int]:
    lines = [(number, line.strip()) for number, line in enumerate(_LINE_END.split(text), start=1)]
    lines = [(number, line) for number, line in lines if line]
    prompts = [(number, line) for number, line in lines if not _COMMENT.match(line)]
    form = _other_form(text, [line for _, line in prompts])
    if form is not None:
        raise ConfigError(f"it looks like {form}")
    return [Entry(f"line {number}", line) for number, line in prompts], len(lines) - len(prompts)


def _other_form(text: str, lines: list[str]) -> str | None:
    """The other form that a text seems to have, with advice; None if it seems to have one prompt per line."""
    first = lines[0] if lines else ""
    if _is_json(first, dict):
        return _JSON_LINES
    if first in ("[", "{", "[{") or _is_json(text, list, dict):
        return "JSON: name the file .json"
    if re.match(r"<\?xml|<!doctype", first, re.IGNORECASE):
        return f"a markup document; {_TEXT_HINT}"
    for delimiter, ending in ((",", ".csv"), ("\t", ".tsv")):
        # in prose, which may begin with "text, ", a blank follows the comma
        names = first.split(delimiter)
        if len(names) > 1 and all(map(_COLUMN_NAME.fullmatch, names)):
            plain = {name.strip("\"'").lower() for name in names}
            if not plain.isdisjoint(KEYS):
                return f"a table (its first line is {first!r}): name the file {ending}"
    if first.lower() in ("prompt", "prompts"):
        return f"a table (its first line is {first!r}): name the file .csv, or remove that line"
    items = [line for line in lines if line != "---" and not re.fullmatch(r"\w+:", line)]
    if items and (all(map(_LIST_MARK.match, items)) or _YAML_KEY.match(items[0])):
        return f"a list in YAML or Markdown (lines begin with {items[0][:2]!r}); {_TEXT_HINT} without that"
    return None


def _is_json(text: str, *kinds: type) -> bool:
    """Returns whether a text is JSON of one of some kinds."""
    try:
        return isinstance(_parsed(text), kinds)
    except ConfigError:
        return False
