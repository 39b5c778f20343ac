from __future__ import annotations

import math

import pytest

from loopfast.errors import ConfigError
from loopfast.system.plugins import import_function, is_reference, reference_of_path


@pytest.mark.parametrize("text", ["math:sqrt", "os.path:join", "_a.b1:_c"])
def test_module_and_function_are_a_reference(text: str) -> None:
    assert is_reference(text)


@pytest.mark.parametrize(
    "text", ["math", "math:", ":sqrt", "math.:sqrt", "a b:c", "a:b:c", "a:b.c", "1a:b", "a:b\n", ""]
)
def test_anything_else_is_not(text: str) -> None:
    assert not is_reference(text)
    with pytest.raises(ConfigError, match="allowed: module:function"):
        import_function(text)


def test_function_is_imported() -> None:
    assert import_function("math:sqrt") is math.sqrt


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("./mine.py:reward", "write mine:reward"),
        ("mine.py:reward", "write mine:reward"),
        ("sub/mine.py:reward", "write sub.mine:reward"),
        ("sub/mine:reward", "write sub.mine:reward"),
        ("../mine.py:reward", "write mine:reward, and start loopfast in the folder '..'"),
        ("/a b/mine.py:reward", "write mine:reward, and start loopfast in the folder '/a b'"),
        ("my-rewards.py:reward", "'my-rewards' cannot be the name of a module; rename the file"),
    ],
)
def test_path_of_a_function_says_how_it_is_written(text: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_function(text)
    assert str(caught.value).startswith(f"{text!r}: a function is written module:function")
    assert advice in str(caught.value)


@pytest.mark.parametrize("text", ["math:sqrt", "http://host:8000", "clip_score", "./mine.py", "a/b:c:d", ""])
def test_other_texts_are_no_path_of_a_function(text: str) -> None:
    assert reference_of_path(text) is None
