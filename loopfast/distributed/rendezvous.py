"""Connects this process to the others that its launcher has started, and disconnects it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from loopfast.distributed.heartbeat import Heartbeat
from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import World
from loopfast.errors import LoopfastError, first_line

dist: Any = torch.distributed

# A process may train one run after another. Each run has its own keys in the launch's store.
_worlds = 0


@contextmanager
def connected(
    launch_env: LaunchEnvironment, device: torch.device, timeout: float, hurried: Callable[[], bool]
) -> Iterator[World]:
    """Context in which this process is connected to the others of its launch.

    The arguments are those of `init_world` and of `World.explained`, and so are the errors.
    """
    world = init_world(launch_env, device, timeout)
    try:
        with world.explained(hurried):
            yield world
    except BaseException:
        abandon_world(world)
        raise
    destroy_world(world)


def init_world(launch_env: LaunchEnvironment, device: torch.device, timeout: float) -> World:
    """Waits for all processes of the launch, and connects this process to them.

    Args:
        launch_env: the rank and the size that the launcher gave this process. Size 1 needs no network.
        device: the device of the models. NCCL connects GPUs; gloo connects CPUs, and the hosts of GPUs too.
        timeout: seconds until connecting, or a collective operation, fails.

    Raises:
        LoopfastError: another process did not connect, or the store cannot be reached.
    """
    global _worlds
    _worlds += 1
    wait = timedelta(seconds=timeout)
    # DeepSpeed reads this process's device here; MPI and SLURM name the variable differently.
    os.environ["LOCAL_RANK"] = str(launch_env.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(launch_env.local_rank % torch.cuda.device_count())
    # The process's next run reuses it, as DeepSpeed keeps the first process group that it is given.
    kept = dist.is_initialized()
    if launch_env.size == 1:
        if not kept:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
        return World(launch_env, device=device)
    try:
        store = _store(launch_env, wait)
        if not kept:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=launch_env.rank,
                world_size=launch_env.size,
                timeout=wait,
            )
        host = dist.new_group(backend="gloo", timeout=wait) if backend == "nccl" else None
        heartbeat = Heartbeat(
            _store(launch_env, wait), launch_env.rank, launch_env.size, _keeps_store(launch_env)
        )
    except (RuntimeError, ValueError) as error:
        raise LoopfastError(
            f"rank {launch_env.rank} cannot join {launch_env.size - 1} other process(es) at "
            f"{launch_env.host}:{launch_env.port}: {first_line(error)}"
        ) from error
    return World(launch_env, dist.PrefixStore("turns", store), device, heartbeat, host)


def destroy_world(world: World) -> None:
    """Ends this process's part in a run. The process group is destroyed when the process ends."""
    abandon_world(world)
    if world.size > 1:
        atexit.register(dist.destroy_process_group)


def abandon_world(world: World) -> None:
    """Ends this process's part in a run after an error, without waiting for connections to dead processes."""
    world.stop_heartbeat()
    atexit.unregister(dist.destroy_process_group)


def is_elastic_restart(launch_env: LaunchEnvironment) -> bool:
    """Returns whether an earlier start of the same launch had opened its run. This start then resumes the run."""
    if not (launch_env.hosted and launch_env.restart):
        return False
    return bool(_base(launch_env, timedelta(seconds=60)).check([_opened_key()]))


def mark_opened(launch_env: LaunchEnvironment) -> None:
    """Records for later starts of the same launch that this launch has opened its run."""
    if launch_env.hosted and launch_env.rank == 0:
        _base(launch_env, timedelta(seconds=60)).set(_opened_key(), "1")


def _opened_key() -> str:
    return f"loopfast/opened/{_worlds}"


def _keeps_store(launch_env: LaunchEnvironment) -> bool:
    return launch_env.rank == 0 and not launch_env.hosted


def _base(launch_env: LaunchEnvironment, wait: timedelta) -> Any:
    try:
        return dist.TCPStore(
            launch_env.host,
            launch_env.port,
            is_master=_keeps_store(launch_env),
            timeout=wait,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise LoopfastError(
            f"rank {launch_env.rank} of {launch_env.size} cannot reach the processes' key-value store at "
            f"{launch_env.host}:{launch_env.port}: {first_line(error)}"
        ) from error


def _store(launch_env: LaunchEnvironment, wait: timedelta) -> Any:
    return dist.PrefixStore(f"loopfast/{launch_env.restart}/{_worlds}", _base(launch_env, wait))
