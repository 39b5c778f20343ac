from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loopfast.embedded import world
from loopfast.errors import ConfigError
from loopfast.prompts import Prompt, load_prompts

MODULE = """
from loopfast.prompts import Prompt

constant = 3

def texts():
    return ("a cat", "a dog")

def prompts():
    yield Prompt("a cat", {"legs": 4})
    yield "a bird"

def nothing():
    return []

def one_text():
    return "a cat"

def number():
    return 3

def mixed():
    return ["a cat", 3]

def blank():
    return ["a cat", " \\u200b "]

def nul():
    return ["a \\0cat"]

def half():
    return ["a \\ud83dcat"]

def fails():
    raise OSError("the disk is gone")

def fails_midway():
    yield "a cat"
    raise OSError("the disk is gone")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, under a name that no other test has imported."""
    name = f"prompts_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return name


@pytest.mark.parametrize("category", [*world.CATEGORIES, "all"])
def test_embedded_prompts_of_a_category(category: str) -> None:
    found = {
        split: load_prompts(f"embedded:{category}{suffix}")
        for split, suffix in (("train", ""), ("validation", "-validation"), ("heldout", "-heldout"))
    }
    for split, prompts in found.items():
        assert [prompt.text for prompt in prompts] == [c.text for c in world.prompts(category, split)]
    texts = [prompt.text for prompts in found.values() for prompt in prompts]
    assert len(set(texts)) == len(texts)
    categories = {prompt.metadata["category"] for prompts in found.values() for prompt in prompts}
    assert categories == (set(world.CATEGORIES) if category == "all" else {category})


def test_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  a dog: très bon  \na cat".encode())
    assert load_prompts(str(file)) == [Prompt("a cat"), Prompt("a dog: très bon"), Prompt("a cat")]


def test_home_folder_is_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("a cat")
    assert load_prompts("~/mine.txt") == [Prompt("a cat")]


def test_what_is_skipped_and_repeated_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# animals\na cat\n\u200b\n\n#hashtag\n#\na cat\na dog\n\ufeff\u3164 \n", "utf-8")
    found = load_prompts(str(file))
    assert [prompt.text for prompt in found] == ["a cat", "#hashtag", "a cat", "a dog"]
    assert [found.place(index) for index in range(4)] == ["line 2", "line 5", "line 7", "line 8"]
    assert found.summary() == "4 prompts (1 of them repeated; skipped: 2 comment lines, 2 invisible prompts)"
    file.write_text("# nothing\n\u200b")
    with pytest.raises(ConfigError, match=r"no prompt in it; .*skipped: 1 comment line, 1 invisible prompt"):
        load_prompts(str(file))


def test_file_whose_name_looks_like_a_function_is_read_as_a_file(module: str) -> None:
    Path(f"{module}:texts").write_text("a horse")
    assert load_prompts(f"{module}:texts") == [Prompt("a horse")]


def test_function_in_the_current_directory(module: str) -> None:
    found = load_prompts(f"{module}:texts")
    assert found == [Prompt("a cat"), Prompt("a dog")]
    assert (found.summary(), found.place(1)) == ("2 prompts", "prompt 2")
    assert load_prompts(f"{module}:prompts") == [Prompt("a cat", {"legs": 4}), Prompt("a bird")]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nothing", "there is no prompt in it"),
        ("one_text", "returned str; allowed: a list of texts or Prompts"),
        ("number", "returned int; allowed: a list of texts or Prompts"),
        ("mixed", "item 1 is int"),
        ("blank", "item 1 is empty"),
        ("nul", "item 0 holds a NUL character"),
        ("half", "item 0 holds half of a surrogate pair"),
        ("fails", "raised OSError: the disk is gone"),
        ("fails_midway", "raised OSError: the disk is gone"),
        ("absent", "'absent' does not exist in"),
        ("constant", "'constant' is not a function in"),
    ],
)
def test_unusable_function_is_reported_by_name(module: str, function: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_prompts(f"{module}:{function}")
    assert f"'{module}:{function}'" in str(caught.value)
    assert reason in str(caught.value)


def make_empty(folder: Path) -> str:
    (folder / "empty.txt").write_text("\n \n")
    return str(folder / "empty.txt")


def make_binary(folder: Path) -> str:
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xfd")
    return str(folder / "binary.txt")


def make_broken_module(folder: Path) -> str:
    (folder / "broken_prompts.py").write_text("import a_module_that_is_not_there")
    return "broken_prompts:texts"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_empty, "there is no prompt in it"),
        (make_binary, "cannot be read"),
        (make_broken_module, "No module named 'a_module_that_is_not_there'"),
        (lambda folder: str(folder), "is a folder; expected: a file in it, or datasets:"),
        (lambda folder: "prompts.txt", "no such file; allowed: a file (.txt"),
        (lambda folder: "a\0b", "no such file; allowed: a file (.txt"),
        (lambda folder: "a" * 5000, "no such file; allowed: a file (.txt"),
        (lambda folder: "not a module:texts", "no such file; allowed: a file (.txt"),
        (lambda folder: "~no-such-user/prompts.txt", "no such file; allowed: a file (.txt"),
        (lambda folder: "./prompts.py:texts", "a function is written module:function: write prompts:texts"),
        (lambda folder: "no_such_module:texts", "No module named 'no_such_module'"),
        (lambda folder: "embedded:colour", "no category 'colour'; allowed: color, shape"),
        (lambda folder: "embedded:", "no category ''; allowed: color, shape"),
        (lambda folder: "embedded", "no category ''; allowed: color, shape"),
    ],
)
def test_unusable_source_is_reported_by_name(
    make: Callable[[Path], str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    source = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_prompts(source)
    assert repr(source) in str(caught.value)
    assert reason in str(caught.value)
