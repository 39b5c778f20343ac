"""Docstrings are sentences that can be read alone, as in a tooltip or a generated reference."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "loopfast", ROOT / "kernels" / "loopfast_kernels")

# A docstring that begins with one of these words has no subject of its own: "Of the pairs, the mean loss."
FRAGMENT = re.compile(r"(What|Whether|How|Of|Where|Inside|Which|As)\b")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def fragments(source: str) -> list[int]:
    """Returns the lines of docstrings that begin as fragments do."""
    return [line for line, text in docstrings(source) if FRAGMENT.match(text)]


def test_no_docstring_is_a_fragment() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
        for line in fragments(path.read_text("utf-8"))
    ]
    assert found == []


def test_fragments_are_told_from_sentences() -> None:
    source = (
        '"""Which rows there are."""\n'
        'def a():\n    """Returns what it is."""\n'
        'def b():\n    """Whether it is so."""\n'
        'class C:\n    """Assets of a run."""\n    def d(self):\n        """Of the pairs."""\n'
        'def e():\n    text = """What is no docstring."""\n'
    )
    assert fragments(source) == [1, 4, 8]
