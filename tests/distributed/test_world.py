from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import loopfast.distributed.heartbeat as heartbeat_module
from loopfast.distributed.heartbeat import Heartbeat
from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.pair_shards import balanced
from loopfast.distributed.rendezvous import init_world
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.errors import LoopfastError, PeerError

dist: Any = torch.distributed


@given(st.integers(1, 9), st.integers(0, 100))
def test_parts_cover_the_rows_evenly(size: int, count: int) -> None:
    parts = World(LaunchEnvironment(0, size)).shards(count)
    assert [row for part in parts for row in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    rows = torch.arange(count)
    owner = World(LaunchEnvironment(0, size)).rank_of(rows, count)
    assert all(rows[part].tolist() == rows[owner == rank].tolist() for rank, part in enumerate(parts))


@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=60))
def test_pairs_are_shared_evenly_and_few_of_them_move(size: int, owners: list[int]) -> None:
    owner = torch.tensor([rank % size for rank in owners], dtype=torch.int64)
    chosen = balanced(owner, size)
    counts = torch.bincount(chosen, minlength=size)
    assert len(chosen) == len(owner)
    assert counts.max() - counts.min() <= 1
    had = torch.bincount(owner, minlength=size)
    # whoever has no more than its share keeps all of it
    assert int((chosen != owner).sum()) == int((had - counts).clamp(min=0).sum())
    assert torch.equal(balanced(owner, size), chosen)


def test_alone_nothing_is_asked_of_anybody() -> None:
    values, ids = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2, 0, 1])
    assert SINGLE_PROCESS.gather(values, ids, 3).tolist() == [1.0, 2.0, 3.0]
    assert SINGLE_PROCESS.sum(values) is values
    assert SINGLE_PROCESS.on_main(lambda: 5) == 5
    assert (
        SINGLE_PROCESS.is_main,
        SINGLE_PROCESS.any(True),
        SINGLE_PROCESS.any(False),
        SINGLE_PROCESS.max(2.5),
    ) == (True, True, False, 2.5)


@pytest.mark.parametrize("ids", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_rows_that_are_missing_or_come_twice_are_an_error(ids: list[int]) -> None:
    with pytest.raises(LoopfastError, match="of 3 rows the processes have sent 3"):
        SINGLE_PROCESS.gather(torch.zeros(3), torch.tensor(ids), 3)


class Wires:
    """Stands for ``torch.distributed``: the other of two processes sends what this one does, and all of it is noted."""

    def __init__(self) -> None:
        self.ReduceOp = dist.ReduceOp
        self.DistError = dist.DistError
        self.gone: list[tuple[str, str]] = []
        self.groups: list[tuple[str, Any]] = []

    def is_initialized(self) -> bool:
        return False

    def _note(self, group: Any, tensor: Tensor) -> None:
        self.gone.append(("default" if group is None else str(group), tensor.device.type))

    def all_reduce(self, tensor: Tensor, operation: Any, group: Any = None) -> None:
        self._note(group, tensor)

    def all_gather(self, parts: list[Tensor], tensor: Tensor, group: Any = None) -> None:
        self._note(group, tensor)
        for rank, part in enumerate(parts):
            # int64 numbers are row numbers, of which the other process has the next one
            numbers = tensor.device.type == "cpu" and tensor.shape[1] == 8
            part.copy_((tensor.view(torch.int64) + rank).view(torch.uint8) if numbers else tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        self._note(None, tensor)

    def init_process_group(self, backend: str, **options: Any) -> None:
        self.groups.append((backend, options["timeout"]))

    def new_group(self, *, backend: str, timeout: timedelta) -> str:
        self.groups.append((backend, timeout))
        return backend


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Wires:
    wires = Wires()
    monkeypatch.setattr("loopfast.distributed.world.dist", wires)
    return wires


def test_ids_beyond_float32_stay_whole(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(LaunchEnvironment(0, 2))
    # the other process sends the next number, which float32 would round to this one
    assert world._all(torch.tensor([2**24])).tolist() == [2**24, 2**24 + 1]
    sent: list[Tensor] = []
    monkeypatch.setattr(world, "_all", lambda values: sent.append(values) or values)
    world.gather(torch.zeros(3), torch.arange(3), 3)
    assert [values.dtype for values in sent] == [torch.int64, torch.float32]


def test_what_is_on_the_host_does_not_travel_through_the_gpu(wires: Wires) -> None:
    # tensors without data stand for a GPU's
    world = World(LaunchEnvironment(0, 2), device=torch.device("meta"), host="gloo")
    assert world.any(True)
    assert not world.any(False)
    assert world.max(2.5) == 2.5
    assert world.gather_texts("all is well") == ["all is well"] * 2
    assert world.gather(torch.tensor([1.5]), torch.tensor([0]), 2).tolist() == [1.5, 1.5]
    assert world.sum(torch.tensor(2.0)) == 2.0
    assert set(wires.gone) == {("gloo", "cpu")}
    wires.gone.clear()
    assert world.sum(torch.empty((), device="meta")).device.type == "meta"
    world.broadcast(torch.empty(3, device="meta"))
    assert set(wires.gone) == {("default", "meta")}


def test_what_is_on_a_gpu_is_gathered_there(wires: Wires) -> None:
    world = World(LaunchEnvironment(0, 2), device=torch.device("meta"), host="gloo")
    rows = world._all(torch.empty(2, 3, device="meta"))
    assert (rows.shape, rows.device.type) == ((4, 3), "meta")
    assert wires.gone == [("default", "meta")]


def test_processes_on_cpus_need_no_second_group(wires: Wires) -> None:
    assert World(LaunchEnvironment(0, 2)).any(True)
    assert wires.gone == [("default", "cpu")]


def test_gpus_are_joined_by_nccl_and_their_hosts_by_gloo(
    wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    for name in ("TCPStore", "PrefixStore"):
        monkeypatch.setattr(wires, name, lambda *arguments, **options: None, raising=False)
    monkeypatch.setattr("loopfast.distributed.rendezvous.dist", wires)
    monkeypatch.setattr("loopfast.distributed.rendezvous.Heartbeat", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    wait = timedelta(seconds=7)
    world = init_world(LaunchEnvironment(5, 8, 5, "host", 1), torch.device("cuda"), 7.0)
    assert wires.groups == [("nccl", wait), ("gloo", wait)]
    assert chosen == [1]
    assert world.any(True)
    assert wires.gone == [("gloo", "cpu")]
    wires.groups.clear()
    init_world(LaunchEnvironment(5, 8, 5, "host", 1), torch.device("cpu"), 7.0)
    assert wires.groups == [("gloo", wait)]


def pair(function: Any, monkeypatch: pytest.MonkeyPatch, silence: float = 8.0) -> list[Any]:
    """What two threads, each with a store and a heartbeat of its own, make of a function."""
    monkeypatch.setattr(heartbeat_module, "BEAT", 0.05)
    monkeypatch.setattr(heartbeat_module, "SILENCE", silence)
    monkeypatch.setattr(heartbeat_module, "GRACE", 30.0)
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10)
    )
    results: list[Any] = [None, None]

    def store() -> Any:
        return dist.TCPStore(
            "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
        )

    def run(rank: int) -> None:
        heartbeat = Heartbeat(store(), rank, 2)
        try:
            results[rank] = function(
                World(LaunchEnvironment(rank, 2), store(), heartbeat=heartbeat), heartbeat
            )
        except LoopfastError as error:
            results[rank] = error
        heartbeat.stop()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_the_others_get_what_the_first_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(world: World, heartbeat: Heartbeat) -> tuple[Any, Any]:
        return world.on_main(lambda: {"rank": world.rank}), world.on_main(lambda: "second")

    assert pair(ask, monkeypatch) == [({"rank": 0}, "second")] * 2


def test_an_error_of_the_first_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(world: World, heartbeat: Heartbeat) -> None:
        def raises() -> None:
            raise LoopfastError("the disk is full")

        with world.explained():
            world.on_main(raises)

    first, second = pair(fail, monkeypatch)
    assert str(first) == str(second) == "the disk is full"
    assert (first.printed_elsewhere, second.printed_elsewhere) == (False, True)


def test_who_fails_is_named_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(world: World, heartbeat: Heartbeat) -> None:
        with world.explained():
            if world.rank == 1:
                raise LoopfastError("no reward")
            world.on_main(lambda: heartbeat._stopped.wait(1.0))
            raise RuntimeError("[gloo/pair.cc:1] Connection closed by peer")

    first, second = pair(fail, monkeypatch)
    assert isinstance(first, PeerError)
    assert str(first) == "rank 1 failed: no reward"
    assert (str(second), second.printed_elsewhere, first.printed_elsewhere) == ("no reward", False, False)


def test_who_is_silent_is_named_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    named = threading.Event()

    def vanish(world: World, heartbeat: Heartbeat) -> None:
        if world.rank == 0:
            heartbeat._stopped.set()
            heartbeat._thread.join()
            assert named.wait(20)
            return
        try:
            with world.explained():
                world.on_main(lambda: None)
        finally:
            named.set()

    _, second = pair(vanish, monkeypatch, silence=1.5)
    assert isinstance(second, PeerError)
    assert "rank 0 has given no sign of life" in str(second)
    assert not second.printed_elsewhere


def test_an_error_of_ones_own_is_not_taken_for_a_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(world: World, heartbeat: Heartbeat) -> str:
        try:
            with world.explained():
                raise ValueError("a defect")
        except ValueError as error:
            return str(error)

    assert pair(fail, monkeypatch) == ["a defect"] * 2
