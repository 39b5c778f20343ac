"""A plugin of pytest that writes a line for each test as it ends: ``-p benchmarks.gpu_check.pytest_lines``."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from .record import Record


class _Lines:
    """Adds up the phases of a test, and writes its line when the last phase has ended."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._reports: dict[str, list[pytest.TestReport]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports[report.nodeid].append(report)
        # a worker of pytest-xdist that dies gives one report, whose phase is "???"
        if report.when not in ("setup", "call"):
            self._write(report.nodeid, self._reports.pop(report.nodeid))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            said = str(report.longrepr).strip().splitlines()
            self._record.write(
                "test", test=report.nodeid, outcome="error", error=said[-1][:300] if said else ""
            )

    def _write(self, test: str, reports: list[Any]) -> None:
        bad = next((report for report in reports if report.outcome != "passed"), None)
        facts: dict[str, Any] = {"seconds": round(sum(report.duration for report in reports), 2)}
        if bad is None:
            outcome = "passed"
        elif bad.skipped:
            outcome = "skipped"
            reason = bad.longrepr[2] if isinstance(bad.longrepr, tuple) else bad.longrepr
            facts["error"] = str(reason).removeprefix("Skipped: ")[:300]
        else:
            outcome = "failed" if bad.when == "call" else "error"
            facts["error"] = _first_line(bad)
        self._record.write("test", test=test, outcome=outcome, **facts)


def _first_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    said = str(report.longrepr) if crash is None else crash.message
    return next((line.strip() for line in said.splitlines() if line.strip()), "")[:300]


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin in the process that receives the reports of all workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines(Record.from_environment("tests", echo=False)))
