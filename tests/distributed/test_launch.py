from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

import loopfast.distributed.launch as launching
from loopfast.errors import Interrupted
from tests.distributed.conftest import NO_REPORT, Runs, metrics, saved


@pytest.fixture
def hangup() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("handler", "handled"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_launch_under_nohup_outlives_its_terminal(
    handler: signal.Handlers, handled: bool, hangup: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(launching, "elastic_launch", lambda config, _: configs.append(config) or print)
    signal.signal(signal.SIGHUP, handler)
    launching.launch([], processes=2, restarts=0)
    assert ("SIGHUP" in configs[0].signals_to_handle.split(",")) == handled
    assert "SIGTERM" in configs[0].signals_to_handle.split(",")


def test_a_launch_that_is_stopped_exits_with_the_signals_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: str) -> None:
        raise SignalException("Process 1 got signal: 15", signal.SIGTERM)

    monkeypatch.setattr(launching, "elastic_launch", lambda *_: stopped)
    with pytest.raises(Interrupted, match=r"^SIGTERM has stopped the processes; --resume auto ") as caught:
        launching.launch([], processes=2, restarts=0)
    assert caught.value.exit_code == 143


# The command line trains another run after this one.
FIRST = """\
import sys, loopfast
first = loopfast.train(sys.argv[3], run={"name": "first-of-two"}, quiet=True)
assert len(first.metrics) == 3
seen = []
def stop(iteration):
    seen.append((iteration.images().shape[0], iteration.rewards.shape))
    iteration.stop()
stopped = loopfast.train(sys.argv[3], run={"name": "first-of-two-stopped"}, quiet=True, callbacks=[stop])
assert len(stopped.metrics) == 2
# the first process calls back, for all images, with those of its own
assert seen == ([(4, (3, 3))] if rank == 0 else []), seen
"""


@pytest.mark.parametrize("stage", [0, 2])
def test_processes_may_train_one_run_after_the_other(stage: int, runs: Runs) -> None:
    settings = (f"distributed.zero_stage={stage}",)
    folder = runs.train(
        f"second-of-two-{stage}", 2, *settings, before=NO_REPORT + FIRST.replace("of-two", f"of-two-{stage}")
    )
    other = folder.with_name(f"first-of-two-{stage}")
    assert metrics(folder) == metrics(other)
    first, second = saved(other), saved(folder)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert runs.ranks.errors(0) == runs.ranks.errors(1) == ""
