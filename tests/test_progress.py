from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.progress import Progress


def report(outcome: str, when: str = "call") -> Any:
    return SimpleNamespace(outcome=outcome, when=when)


def test_a_line_for_each_tenth_and_nothing_for_a_test_that_passes(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.pytest_xdist_node_collection_finished(ids=["name"] * 25)
    for _ in range(25):
        progress.pytest_runtest_logfinish()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].strip() for line in lines] == [
        f"{done} of 25 tests" for done in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)
    ]
    assert progress.pytest_report_teststatus(report("passed")) == ("passed", "", "")
    assert progress.pytest_report_teststatus(report("skipped", "setup")) == ("skipped", "", "")
    # pytest shows these itself
    for shown in (report("failed"), report("passed", "setup"), report("failed", "teardown")):
        assert progress.pytest_report_teststatus(shown) is None
