"""Some odd inputs of each kind; many: ``python -m tests.fuzz``."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from loopfast.errors import ConfigError
from tests import fuzz


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("yaml", 150), ("command", 150), ("prompts", 150), ("deepspeed", 150), ("environment", 150)],
)
def test_odd_input_is_taken_or_refused_in_one_message(kind: str, inputs: int) -> None:
    findings: list[str] = []
    counts = fuzz.fuzz(kind, range(inputs), 1, findings.append)
    assert findings == []
    # both happen: it is neither all noise nor all right
    assert counts["accepted"] > inputs // 20
    assert counts["refused"] > inputs // 20


def test_an_input_can_be_repeated(tmp_path: Any) -> None:
    for kind, make in fuzz.KINDS.items():
        given = [make(random.Random("0"), tmp_path)[1] for _ in range(2)]
        assert given[0] == given[1], kind


def fails(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "ended"),
    [
        (lambda: 2, "refused"),
        (fails(ConfigError("2 problems\n  a.yaml, line 1: this\n  a.yaml, line 2: that")), "refused"),
        (fails(ConfigError("a message\nof two lines")), "finding"),
        (lambda: 3, "finding"),
        (fails(ValueError("a defect")), "finding"),
        (fails(SystemExit(1)), "finding"),
        (fails(UnicodeEncodeError("ascii", "±", 0, 1, "ordinal not in range")), "finding"),
    ],
)
def test_a_finding_is_found(call: Callable[[], object], ended: str) -> None:
    assert fuzz.outcome(call)[0] == ended


def test_an_input_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(fuzz.KINDS, "yaml", lambda *_: (lambda: time.sleep(3600), "asleep"))
    findings: list[str] = []
    assert fuzz.fuzz("yaml", range(1), 0, findings.append)["finding"] == 1
    assert "--kind yaml --seed 0 --only 0: 'asleep'" in findings[0]
    assert "more than 1 s" in findings[0]
