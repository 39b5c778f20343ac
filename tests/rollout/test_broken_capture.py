"""A recording that fails on a GPU leaves the process sound. Each runs in a process of its own, which it may break."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["seen", "unseen", "out-of-memory"])
def test_a_process_goes_on_after_a_recording_that_fails(pipeline_folder: Path, kind: str) -> None:
    command = [sys.executable, "-m", "tests.rollout.broken_capture", str(pipeline_folder), kind]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reason, last = done.stdout.splitlines()[-2:]
    assert last == "sound"
    if kind == "seen":
        assert "it waits for the GPU at" in reason
