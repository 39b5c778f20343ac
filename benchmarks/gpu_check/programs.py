"""Runs a program whose output contains its findings."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence


def run_and_show(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Runs a program and prints its output at once.

    Args:
        command: the program and its arguments.
        environment: further variables.

    Returns:
        Its exit status and its output.
    """
    lines = []
    with subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)
