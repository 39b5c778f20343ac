from __future__ import annotations

import codecs
import csv
import io
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loopfast.errors import ConfigError
from loopfast.prompts import Prompt, load_prompts

ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
# One line of what people see, with separators inside that are no line ends.
PROMPTS = st.lists(
    st.builds(
        "a{}z".format, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n\ufeff"))
    ),
    min_size=1,
    max_size=5,
)


def load(data: bytes | str, name: str = "prompts.txt") -> list[Prompt]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        return load_prompts(str(file))


def texts(data: bytes | str, name: str = "prompts.txt") -> list[str]:
    return [prompt.text for prompt in load(data, name)]


def refusal(data: bytes | str, name: str = "prompts.txt") -> str:
    with pytest.raises(ConfigError) as caught:
        load(data, name)
    message = str(caught.value)
    assert f"{name}': " in message
    assert "\n" not in message
    return message.partition(f"{name}': ")[2]


def as_table(prompts: list[str], end: str, delimiter: str) -> str:
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, lineterminator=end)
    writer.writerows([["id", "Prompt"], *([number, text] for number, text in enumerate(prompts))])
    return written.getvalue()


def written(prompts: list[str], form: str, end: str) -> str:
    if form == "json":
        return json.dumps(prompts, ensure_ascii=False, indent=1).replace("\n", end)
    if form == "jsonl":
        return "".join(json.dumps({"TEXT": text}, ensure_ascii=False) + end for text in prompts)
    if form in ("csv", "tsv"):
        return as_table(prompts, end, "," if form == "csv" else "\t")
    return "".join(text + end for text in prompts)


@given(
    PROMPTS,
    st.sampled_from(["txt", "json", "jsonl", "csv", "tsv"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(sorted(ENCODINGS)),
)
@example(["a café\x85 in the\u2028 rain\x0c\x1c\x0bz"], "txt", "\n", "utf-8")
@example(['a "red", and\ta blue z'], "csv", "\r", "utf-16-be")
def test_prompts_read_back_as_they_were_written(
    prompts: list[str], form: str, end: str, encoding: str
) -> None:
    data = ENCODINGS[encoding] + written(prompts, form, end).encode(encoding)
    assert texts(data, f"prompts.{form}") == prompts


STRUCTURE = st.text('[]{}",:;\\\t\n\r #-aprompttext1\0\u200b\ufeff', max_size=60).map(str.encode)


@given(st.binary(max_size=40) | STRUCTURE, st.sampled_from(["txt", "json", "jsonl", "csv", "tsv"]))
@example(b"[" * 100_000, "json")
@example(b"[" * 100_000, "txt")
@example(b"1" * 5_000, "jsonl")
@example(b'"', "csv")
@example(b"\n\n", "csv")
@example(b'"\\ud800"', "jsonl")
def test_any_bytes_are_prompts_or_one_line_of_error(data: bytes, form: str) -> None:
    try:
        found = texts(data, f"prompts.{form}")
    except ConfigError as error:
        found = str(error).split("\n")
        allowed = 1
    else:
        allowed = len(found)
    assert 0 < len(found) <= allowed
    assert all(text.encode() for text in found)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (
            "jsonl",
            '{"prompt": "a cat", "text": "x", "tag": "one", "include": [{"n": 1}]}\n\n{"Text": "a dog"}\n"a cow"',
        ),
        (
            "ndjson",
            '{"prompt": "a cat", "text": "x", "tag": "one", "include": [{"n": 1}]}\n{"Text": "a dog"}\n"a cow"',
        ),
        (
            "json",
            '[{"PROMPT": "a cat", "text": "x", "tag": "one", "include": [{"n": 1}]}, {"text": "a dog"}, "a cow"]',
        ),
    ],
)
def test_what_is_beside_a_prompt_in_json_is_its_metadata(form: str, text: str) -> None:
    metadata = {"text": "x", "tag": "one", "include": [{"n": 1}]}
    assert load(text, f"x.{form}") == [Prompt("a cat", metadata), Prompt("a dog"), Prompt("a cow")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", 'prompt,category\n"a cat, and a dog",animal\n\na car,\n'),
        ("x.CSV", 'category , Prompt\nanimal, "a cat, and a dog"\n,a car\n'),
        ("x.tsv", "Text\tcategory\r\na cat, and a dog\tanimal\r\na car\t\r\n"),
        ("x.csv", '\ufeff,text,category\n0,"a cat, and a dog",animal\n1,a car,\n'),
    ],
)
def test_other_columns_of_a_table_are_metadata(name: str, text: str) -> None:
    found = load(text, name)
    assert [prompt.text for prompt in found] == ["a cat, and a dog", "a car"]
    assert [dict(prompt.metadata) for prompt in found] == [{"category": "animal"}, {}]


def test_a_prompt_in_a_table_may_have_lines() -> None:
    assert texts('prompt,n\n"a cat\non a mat",1\na dog,2\n', "x.csv") == ["a cat\non a mat", "a dog"]


REAL = """\
a cat [red]on a mat[/red]
(masterpiece:1.3), [cat:dog:0.5], <lora:x:1>
<script>alert(1)</script> a red circle
text, signage, neon letters
{{ jinja }} {% raw %}
--steps 20 a cat
- a dash
{a|b} cat
[[cat]]
#hashtag
"a quoted cat"
prompt: a cat
a,prompt,with commas
```python x"""


@pytest.mark.parametrize("first", range(len(REAL.splitlines())))
def test_what_people_write_is_a_prompt_wherever_it_stands(first: int) -> None:
    lines = REAL.splitlines()
    lines = ["a cat", *lines] if lines[first].startswith(("-", "a,")) else lines[first:] + lines[:first]
    assert texts("\n".join(lines)) == lines


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("x.txt", '[\n  "a cat",\n  "a dog"\n]', "looks like JSON: name the file .json"),
        ("x.txt", '["a cat", "a dog"]', "looks like JSON: name the file .json"),
        ("x.txt", '{"prompts": ["a cat"]}', "looks like JSON"),
        ("x", '{"prompt": "a cat"}\n{"prompt": "a dog"}', "looks like JSON lines (an object on each line)"),
        (
            "x.txt",
            "prompt,category\na cat,animal\n",
            "looks like a table (its first line is 'prompt,category')",
        ),
        ("x.txt", "id\tText\n1\ta cat\n", "name the file .tsv"),
        ("x.txt", "# animals\nPrompt\na cat\n", "name the file .csv, or remove that line"),
        ("x.txt", "- a cat\n- a dog\n", "a list in YAML or Markdown (lines begin with '- ')"),
        ("x.txt", "prompts:\n  - a cat\n  - a dog\n", "a list in YAML or Markdown"),
        ("x.txt", "- prompt: a cat\n  category: animal\n", "a list in YAML or Markdown"),
        ("x.txt", "* a cat\n* a dog\n", "a list in YAML or Markdown (lines begin with '* ')"),
        ("x.txt", "<?xml version='1.0'?>\n<a/>", "looks like a markup document"),
        ("x.yaml", "- a cat\n", "a .yaml file is YAML, which is not read as prompts"),
        ("x.parquet", "PAR1", "name its folder: datasets:<folder>"),
        ("x.txt.gz", b"\x1f\x8b", "a .gz file is an archive, which is not read as prompts; unpack it"),
        ("x.xlsx", b"PK", "an office document, which is not read as prompts; save it as .csv"),
        ("x.py", "def prompts(): ...", "name a function in it: <module>:<function>, without .py"),
        ("x.json", '{"prompt": "a cat"}\n{"prompt": "a dog"}', "looks like JSON lines"),
        ("x.json", '{"prompts": ["a cat"]}', "the file holds an object; allowed: a list of texts"),
        ("x.json", '["a cat",]', "the file is not JSON: "),
        (
            "x.json",
            '["a cat", 3]',
            "item 2 is a number; allowed: a text, or an object with a key prompt or text",
        ),
        ("x.json", '[{"caption": "a cat"}]', "item 1 has no key prompt or text; found: 'caption'"),
        ("x.json", "[{}]", "item 1 has no key prompt or text; found: nothing"),
        ("x.jsonl", '{"prompt": "a cat"}\na dog\n', "line 2 is not JSON: "),
        ("x.jsonl", '{"prompt": null}', "line 1: prompt is null; allowed: a text"),
        ("x.jsonl", '{"prompt": "a", "Prompt": "b"}', "'prompt' and 'Prompt' both name the prompt"),
        ("x.jsonl", '"a\\ud800cat"', "line 1 holds half of a surrogate pair"),
        ("x.jsonl", '"a cat\\u0000"', "line 1 holds a NUL character"),
        ("x.csv", "a cat\na dog\n", "no column is named prompt or text"),
        ("x.csv", "prompt;category\na cat;animal\n", "separated by commas; found: 'prompt;category'"),
        ("x.csv", "prompt\na cat, a dog\n", "line 2 has 2 field(s), but the first line names 1"),
        ("x.tsv", "prompt\tn\na cat\n", "line 2 has 1 field(s), but the first line names 2"),
        ("x.csv", 'prompt,n\n"a cat,1\na dog,2\n', "line 3 is broken: unexpected end of data"),
        ("x.txt", "a dog\na café\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
        ("x.csv", "prompt\na café\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
        ("x.txt", codecs.BOM_UTF16_LE + "a\r\nb".encode("utf-16-le") + b"\0", "line 2 is not UTF-16-LE"),
        ("x.txt", "a dog\ra cat\0\n", "line 2 holds a NUL character"),
        ("x.txt", "a dog\n".encode("utf-16-le"), "line 1 holds a NUL character"),
        ("x.txt", b"", "there is no prompt in it"),
        ("x.json", b"\n", "there is no prompt in it"),
        ("x.csv", b"", "there is no prompt in it"),
        ("x.jsonl", codecs.BOM_UTF8, "there is no prompt in it"),
    ],
)
def test_what_is_no_file_of_prompts_says_what_it_is(name: str, text: bytes | str, reason: str) -> None:
    assert reason in refusal(text, name)


def test_marks_of_files_that_were_joined_are_removed() -> None:
    assert texts("\ufeffa cat\n\ufeffa dog\na \ufeffcow") == ["a cat", "a dog", "a cow"]
    assert texts('\ufeff{"text": "a cat"}\n\ufeff{"text": "a dog"}', "x.jsonl") == ["a cat", "a dog"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat")
    file.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        load_prompts(str(file))
