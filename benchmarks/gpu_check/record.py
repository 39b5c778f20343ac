"""Figures as lines of JSON, each in the file as soon as it is known.

A line has the keys ``run``, ``stage`` and ``what``; the others are its figures. Several processes may write into one
file: a line is one write at the file's end.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]

# The variables that give a stage's process the file and the names of its lines.
_FILE, _RUN, _STAGE = "GPU_CHECK_FILE", "GPU_CHECK_RUN", "GPU_CHECK_STAGE"


class Record:
    """A writer of a stage's figures.

    Args:
        path: the file; None only prints the lines.
        run: the name of this run of the check.
        stage: the stage's name.
        echo: whether each line is printed too.
    """

    def __init__(self, path: Path | None, run: str, stage: str, *, echo: bool = False) -> None:
        self._path, self._run, self._stage, self._echo = path, run, stage, echo

    @classmethod
    def from_environment(cls, stage: str, *, echo: bool = True) -> Record:
        """Returns the record that the check has given to this process, or a record without a file if no check runs."""
        file = os.environ.get(_FILE)
        run, stage = os.environ.get(_RUN, "by hand"), os.environ.get(_STAGE, stage)
        return cls(Path(file) if file else None, run, stage, echo=echo)

    def environment(self) -> dict[str, str]:
        """The variables from which another process makes the same record."""
        return {_FILE: str(self._path or ""), _RUN: self._run, _STAGE: self._stage}

    def write(self, what: str, **figures: Any) -> None:
        """Adds a line.

        Args:
            what: what was measured.
            figures: values that JSON can hold; a number that is not finite becomes null.
        """
        line = {"run": self._run, "stage": self._stage, "what": what, **figures}
        text = json.dumps(_finite(line)) + "\n"
        if self._echo:
            print(text, end="", flush=True)
        if self._path is not None:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, text.encode())
            finally:
                os.close(file)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_lines(path: Path) -> list[Line]:
    """Reads all lines of a file, in order; none if there is no file. A line that a kill has cut off is skipped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"run", "stage", "what"} <= line.keys():
            lines.append(line)
    return lines


def latest(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Returns the lines of each stage's latest run, by stage.

    Runs on another device, or of another size, than the latest run are skipped, because their figures cannot be
    compared. The first lines of the runs (stage ``check``) are only those of the latest run.
    """
    lines = list(lines)
    starts = {line["run"]: line for line in lines if (line["stage"], line["what"]) == ("check", "start")}
    if not starts:
        return {}
    last = list(starts.values())[-1]
    alike = {run for run, line in starts.items() if _kind(line) == _kind(last)}
    stages: dict[str, list[Line]] = {}
    for line in lines:
        if line["run"] not in alike or (line["stage"] == "check" and line["run"] != last["run"]):
            continue
        found = stages.setdefault(line["stage"], [])
        if found and found[0]["run"] != line["run"]:
            found.clear()
        found.append(line)
    return stages


def _kind(start: Line) -> tuple[Any, Any]:
    return start.get("device"), start.get("small")


def first_line(error: BaseException, length: int = 300) -> str:
    """Returns an error on one line: its type and the first line of its message."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"[:length]
