"""A line for each tenth of a long run of pytest instead of a letter for each test: ``pytest -p tests.progress``."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

_OUTCOMES = ("passed", "skipped")


class Progress:
    """Prints the progress of the run; failures are shown as pytest shows them."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._count = self._done = self._tenths = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._count = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._count = len(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        # Without a letter and a word the terminal counts a test and prints nothing.
        if report.outcome in _OUTCOMES and (report.when == "call" or report.outcome == "skipped"):
            return report.outcome, "", ""
        return None

    def pytest_runtest_logfinish(self) -> None:
        self._done += 1
        tenths = 10 * self._done // self._count if self._count else 0
        if tenths > self._tenths:
            self._tenths = tenths
            seconds = round(time.monotonic() - self._began)
            print(f"{self._done:>5} of {self._count} tests, {seconds // 60}:{seconds % 60:02}", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress())
