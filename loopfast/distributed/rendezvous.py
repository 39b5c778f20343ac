"""Joins the group of processes that a launcher has started, and leaves it."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from loopfast.distributed.group import Group
from loopfast.distributed.heartbeat import Watch
from loopfast.distributed.launcher import Place
from loopfast.errors import LoopfastError, first_line

dist: Any = torch.distributed

# A process may train one run after the other; in the launch's store each has a place of its own.
_groups_joined = 0


def joined(place: Place, device: torch.device, timeout: float) -> Group:
    """The group that a launcher has put this process in, once all of it is there.

    Args:
        place: where; alone, a group of one is made, which needs no network.
        device: of the models; NCCL connects GPUs, and gloo CPUs, which hosts of GPUs have as well.
        timeout: seconds after which joining, or a collective operation, is given up.

    Raises:
        LoopfastError: the others did not come, or the store cannot be reached.
    """
    global _groups_joined
    _groups_joined += 1
    wait = timedelta(seconds=timeout)
    # DeepSpeed takes this process's device from it; MPI and SLURM have other names for it
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    # kept for the process's next run: DeepSpeed holds on to the first group it is given
    kept = dist.is_initialized()
    if place.size == 1:
        if not kept:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
        return Group(place, device=device)
    try:
        store = _store(place, wait)
        if not kept:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=place.rank,
                world_size=place.size,
                timeout=wait,
            )
        host = dist.new_group(backend="gloo", timeout=wait) if backend == "nccl" else None
        watch = Watch(_store(place, wait), place.rank, place.size, _keeps_store(place))
    except (RuntimeError, ValueError) as error:
        raise LoopfastError(
            f"rank {place.rank} cannot join {place.size - 1} other process(es) at {place.host}:{place.port}: "
            f"{first_line(error)}"
        ) from error
    return Group(place, dist.PrefixStore("turns", store), device, watch, host)


def leave(group: Group) -> None:
    """Ends this process's part in a run; nobody is told of an error any more. Connections end with the process."""
    abandon(group)
    if not group.alone:
        atexit.register(dist.destroy_process_group)


def abandon(group: Group) -> None:
    """As `leave`, after an error: connections to processes that have died would be waited for."""
    group.end_watch()
    atexit.unregister(dist.destroy_process_group)


def opened_before(place: Place) -> bool:
    """Whether an earlier start of the same launch had opened its run: then this one goes on with it."""
    if not (place.hosted and place.restart):
        return False
    return bool(_base(place, timedelta(seconds=60)).check([_opened()]))


def note_opened(place: Place) -> None:
    """Tells later starts of the same launch that the run's folder is this launch's."""
    if place.hosted and place.rank == 0:
        _base(place, timedelta(seconds=60)).set(_opened(), "1")


def _opened() -> str:
    return f"loopfast/opened/{_groups_joined}"


def _keeps_store(place: Place) -> bool:
    return place.rank == 0 and not place.hosted


def _base(place: Place, wait: timedelta) -> Any:
    try:
        return dist.TCPStore(
            place.host,
            place.port,
            is_master=_keeps_store(place),
            timeout=wait,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise LoopfastError(
            f"rank {place.rank} of {place.size} cannot reach the group's store at {place.host}:{place.port}: "
            f"{first_line(error)}"
        ) from error


def _store(place: Place, wait: timedelta) -> Any:
    return dist.PrefixStore(f"loopfast/{place.restart}/{_groups_joined}", _base(place, wait))
