from __future__ import annotations

import math

import pytest

from loopfast.errors import ConfigError
from loopfast.plugins import import_function, is_reference


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
