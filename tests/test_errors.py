"""Texts of messages."""

from __future__ import annotations

import pytest

from loopfast.errors import ConfigError, as_config_error, first_line, one_line, short


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n the shape is wrong\nTry another. "), "the shape is wrong"),
        (KeyError("unet.bias"), "there is no 'unet.bias'"),
        (ValueError(), "ValueError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_what_an_error_says_first(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_a_text_is_one_short_line() -> None:
    assert one_line(" a\tcat\r\n  on a mat ") == "a cat on a mat"
    assert one_line("a " * 200, most=9) == "a a a ..."
    assert short("x" * 60) == "x" * 60
    assert short("x" * 61) == "x" * 57 + "..."


def test_an_error_of_these_kinds_becomes_the_users() -> None:
    with (
        pytest.raises(ConfigError, match=r"^model\.x: cannot load: no file$"),
        as_config_error("model.x: cannot load", OSError, ValueError),
    ):
        raise ValueError("no file\nadvice")
    with pytest.raises(TypeError), as_config_error("model.x", ValueError):
        raise TypeError
