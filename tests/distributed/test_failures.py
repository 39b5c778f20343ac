"""A process that dies ends the others, with its name, and loses nothing but the unfinished iteration."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import NO_REPORT, Runs, distance, saved
from tests.distributed.ranks import FORKED_LAUNCH

OPTIONS = ("distributed.zero_stage=2",)

# A silent process counts as dead after 30 seconds, and those who wait for it have 10 more; here sooner.
SOON = """\
from loopfast.distributed import heartbeat
heartbeat.BEAT, heartbeat.SILENCE, heartbeat.GRACE = 0.2, 2.0, 1.0
"""

MID_UPDATE = """\
import os, signal, loopfast.engines.zero as engines
backward = engines.ZeroEngine.backward
def killed(self, *arguments, **options):
    if rank == 1:
        os.kill(os.getpid(), signal.{signal})
    return backward(self, *arguments, **options)
engines.ZeroEngine.backward = killed
"""

MID_CHECKPOINT = """\
import os, signal
from loopfast.run.checkpoints import CheckpointStore
def killed(self, temporary, name):
    os.kill(os.getpid(), signal.SIGKILL)
CheckpointStore._put_in_place = killed
"""


@pytest.mark.parametrize(
    ("moment", "victim", "named"),
    [
        (MID_UPDATE.format(signal="SIGKILL"), 1, "rank 1"),
        # it is there, but does not answer: nothing breaks the connection
        (MID_UPDATE.format(signal="SIGSTOP"), 1, "rank 1"),
        (MID_CHECKPOINT, 0, "rank 0"),
    ],
    ids=["update-1", "hang", "checkpoint-0"],
)
def test_a_killed_process_ends_the_others(
    moment: str, victim: int, named: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    name = f"killed-{request.node.callspec.id}"
    arguments = runs.arguments(name, *OPTIONS)
    began = time.monotonic()
    runs.ranks.start(arguments, 2, before=SOON + moment)
    if "SIGSTOP" in moment:
        # a stopped process is not missed once the other has ended
        other, stopped = runs.ranks.pids
        while Path(f"/proc/{other}").exists() and time.monotonic() < began + 90:
            time.sleep(0.05)
        os.kill(stopped, signal.SIGKILL)
    codes = runs.ranks.wait()
    assert codes[victim] == -signal.SIGKILL
    survivor = 1 - victim
    assert codes[survivor] == 1, runs.ranks.errors(survivor)
    assert time.monotonic() - began < 300  # it was noticed, not waited out
    [line] = runs.ranks.errors(survivor).splitlines()
    assert line.startswith("error: ")
    assert named in line
    if victim == 0:
        # what the run was about to save is gone; how many go on does not matter
        folder = runs.train(name, 1, "distributed.zero_stage=0", resume="auto")
        assert distance(saved(folder), saved(runs.folder / runs.shared(1))) < 1e-6
        assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


BAD_REWARD = """\
from loopfast.errors import RewardError
from loopfast.rewards.base import RewardSet
score, calls = RewardSet.score, []
def failing(self, images, prompts, metadata, **options):
    calls.append(1)
    if rank == 1 and len(calls) > 1:  # the first is the evaluation before training
        raise RewardError("reward embedded: the judge has gone home", range(len(prompts)))
    return score(self, images, prompts, metadata, **options)
RewardSet.score = failing
"""


def test_an_error_in_one_process_is_said_once_and_ends_all(runs: Runs) -> None:
    runs.ranks.start(runs.arguments("judge", *OPTIONS), 2, before=SOON + BAD_REWARD)
    assert runs.ranks.wait() == [1, 1]
    kept = runs.folder / "judge" / "failures" / "iteration-000001-rank-1"
    state = runs.folder / "judge" / "checkpoints" / "iteration-000000"
    assert runs.ranks.errors(0) == (
        f"error: iteration 1: reward embedded: the judge has gone home; images and prompts are in {kept}; "
        f"{state} is saved, --resume auto goes on from there\n"
    )
    assert runs.ranks.errors(1) == ""
    assert (kept / "000.png").exists()
    assert state.is_dir()


def test_an_error_of_the_first_process_is_said_once(runs: Runs) -> None:
    runs.ranks.start(runs.arguments(runs.shared(2, *OPTIONS), *OPTIONS), 2)
    assert runs.ranks.wait() == [2, 2]
    assert "already holds a run" in runs.ranks.errors(0)
    assert runs.ranks.errors(1) == ""


FULL_DISK = """\
from pathlib import Path
from loopfast.run.tracking import Tracker
record = Tracker.record
def full(self, metrics):
    if metrics["iteration"] == 1:
        self._file = Path("/dev/full").open("w")
    record(self, metrics)
Tracker.record = full
"""


def test_metrics_that_cannot_be_written_end_all_with_their_state_saved(runs: Runs) -> None:
    runs.ranks.start(runs.arguments("full-disk", *OPTIONS), 2, before=SOON + FULL_DISK)
    assert runs.ranks.wait() == [1, 1]
    folder = runs.folder / "full-disk"
    assert runs.ranks.errors(0) == (
        f"error: cannot write the metrics in {folder}: {os.strerror(errno.ENOSPC)}; "
        f"{folder / 'checkpoints' / 'iteration-000001'} is saved, --resume auto goes on from there\n"
    )
    assert runs.ranks.errors(1) == ""


# The variables of mpirun instead of those of torchrun.
MPIRUN = """\
import os
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
    del os.environ[name]
for name in ("", "LOCAL_"):
    os.environ[f"OMPI_COMM_WORLD_{name}RANK"] = str(rank)
    os.environ[f"OMPI_COMM_WORLD_{name}SIZE"] = "2"
"""


def test_processes_that_mpirun_has_started_train_together(runs: Runs) -> None:
    folder = runs.train("mpirun", 2, *OPTIONS, before=MPIRUN + NO_REPORT)
    assert runs.ranks.errors(0) == runs.ranks.errors(1) == ""
    assert distance(saved(folder), saved(runs.folder / runs.shared(2, *OPTIONS))) < 1e-6


def test_more_processes_than_images_are_refused(runs: Runs) -> None:
    images = ("rollout.prompts_per_iteration=1", "algorithm.samples_per_prompt=2")
    runs.ranks.start(runs.arguments("few", *OPTIONS, *images, "train.updates_per_iteration=1"), 3)
    assert runs.ranks.wait() == [2, 2, 2]
    assert "found 2 image(s), allowed: at least 3, one for each process" in runs.ranks.errors(0)


# One of the processes dies once.
KILLED_ONCE = """\
import os, signal
import loopfast.engines.zero as engines

backward, calls = engines.ZeroEngine.backward, []

def killed(self, *arguments, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(self, *arguments, **options)

engines.ZeroEngine.backward = killed
"""


def test_a_launch_goes_on_after_a_kill(runs: Runs) -> None:
    arguments = runs.arguments("launched", *OPTIONS)[1:]
    command = ["launch", "--nproc", "2", "--max-restarts", "1", *arguments]
    runs.ranks.run(command, 1, before=FORKED_LAUNCH + KILLED_ONCE + NO_REPORT)
    assert runs.ranks.shown(0).count("loopfast train\n") == 2, "it was not started again"
    assert distance(saved(runs.folder / "launched"), saved(runs.folder / runs.shared(2, *OPTIONS))) < 1e-6


def test_a_launch_says_an_error_that_all_processes_have_once(runs: Runs) -> None:
    arguments = runs.arguments("unlaunched", *OPTIONS, "prompts.source=nowhere.txt")[1:]
    runs.ranks.start(["launch", "--nproc", "2", *arguments], 1, before=FORKED_LAUNCH)
    assert runs.ranks.wait() == [2]
    [line] = runs.ranks.errors(0).splitlines()
    # by the process that ends with it, or by the first because of that
    assert re.match(r"error: (rank 1 failed: )?prompts 'nowhere\.txt': no such file; allowed: ", line)


@pytest.mark.parametrize(
    ("end", "restarts", "code", "said"),
    [
        ("exit 3", 0, 3, r"exited with 3; --max-restarts N starts it anew"),
        ("kill -9 $$", 1, 137, r"was ended by SIGKILL, and 1 restart\(s\) are used up"),
    ],
)
def test_a_launch_names_the_process_that_fails(
    end: str, restarts: int, code: int, said: str, runs: Runs, tmp_path: Path
) -> None:
    # instead of a Python that imports everything
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "error: $*" >&2\n{end}\n')
    program.chmod(0o755)
    before = (
        f"import loopfast.distributed.launch\nloopfast.distributed.launch.sys.executable = {str(program)!r}\n"
    )
    command = ["launch", "--nproc", "2", "--config", "tiny", "--resume", "nowhere"]
    runs.ranks.start([*command, "--max-restarts", str(restarts)], 1, before=before)
    assert runs.ranks.wait() == [code]
    *lines, last = runs.ranks.errors(0).splitlines()
    assert lines[0] == "error: -m loopfast train --config tiny --resume nowhere"
    # both end at once; either may be seen first
    assert re.fullmatch(rf"error: rank [01] {said}; --resume auto goes on from .*", last)
