from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.planning.check_memory import RUN, planned
from tests.distributed.ranks import Ranks, shared_ranks

# What the process holds before, and at its peak.
MEASURED = """\
import json, sys
from pathlib import Path
from benchmarks.planning.check_memory import run
from loopfast.system.allocator import reuse_freed_memory

status = Path("/proc/self/status").read_text()
before = 1024 * int(status.partition("VmRSS:")[2].split()[0])
reuse_freed_memory()
print(before, run(*json.loads(sys.argv[1]), tensors=False))
"""
LIBRARIES = 460 * 2**20  # of what is planned; a forked process holds another part of them


@pytest.fixture
def ranks() -> Ranks:
    return shared_ranks()


def test_a_process_holds_what_is_planned(structured_folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    text = RUN.replace("MODEL", str(structured_folder)).replace("DEVICE", "cpu")
    settings = [f"run.directory={tmp_path}", "rollout.steps=1", "evaluation.limit_prompts=1"]
    settings += ["rollout.prompts_per_iteration=1", "train.updates_per_iteration=1", "train.microbatch=2"]
    ranks.fork(MEASURED, [json.dumps([text, settings])])
    assert ranks.wait() == [0], ranks.errors(0)
    before, peak = map(int, ranks.shown(0).split())
    assert planned(text, settings)["process"] - LIBRARIES + before == pytest.approx(peak, rel=0.2)
