"""What DeepSpeed makes the host wait for: on a GPU each wait leaves the device without work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import Runs

# DeepSpeed asks its accelerator to wait; on a CPU that does nothing, but it can be counted.
COUNT = """\
import loopfast.engines.zero3
from deepspeed.accelerator import get_accelerator

def note(word):
    with open({file!r}, "a") as file:
        print(word, file=file)

get_accelerator().synchronize = lambda device_index=None: note("wait")
through = loopfast.engines.zero3.ZeroEngine.call
def call(self, *arguments):
    note("call")
    return through(self, *arguments)
loopfast.engines.zero3.ZeroEngine.call = call
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_no_call_of_the_denoiser_waits_for_the_device(stage: int, runs: Runs, tmp_path: Path) -> None:
    """DeepSpeed's throughput timer, on by default, would wait at each call after the second update."""
    file = tmp_path / "noted"
    options = (f"distributed.zero_stage={stage}", "rollout.replica=none")
    runs.train(f"waits-{stage}", 1, *options, before=COUNT.format(file=str(file)))
    noted = file.read_text().split()
    assert noted.count("call") > 20
    assert noted.count("wait") == 0
