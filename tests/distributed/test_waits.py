"""What DeepSpeed makes the host wait for: on a GPU each wait leaves the device without work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import NO_REPORT, Runs

# DeepSpeed asks its accelerator to wait; on a CPU that does nothing, but it can be counted.
COUNT = """\
from deepspeed.accelerator import get_accelerator
from loopfast.engines.zero import ZeroEngine

def noting(word, function=lambda *arguments: None):
    def noted(*arguments):
        with open({file!r}, "a") as file:
            print(word, file=file)
        return function(*arguments)
    return noted

get_accelerator().synchronize = noting("wait")
ZeroEngine.call, ZeroEngine.update = noting("call", ZeroEngine.call), noting("update", ZeroEngine.update)
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_no_call_of_the_denoiser_waits_for_the_device(stage: int, runs: Runs, tmp_path: Path) -> None:
    """DeepSpeed's throughput timer, on by default, would wait at each call after the second update."""
    file = tmp_path / "noted"
    options = (
        f"distributed.zero_stage={stage}",
        "rollout.replica=none",
        "rollout.microbatch=9",
        "train.updates_per_iteration=3",
    )
    runs.train(
        f"waits-{stage}", 1, *options, "train.iterations=1", before=NO_REPORT + COUNT.format(file=str(file))
    )
    noted = file.read_text()
    assert noted.split("update\n", 2)[2].count("call") > 2
    assert "wait" not in noted
