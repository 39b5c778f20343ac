"""Reads the rank and the world size that a launcher gave this process.

The launchers are ``torchrun``, ``deepspeed``, ``loopfast launch``, ``mpirun`` and ``srun``. Nothing else in the
package reads their variables.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loopfast.errors import LoopfastError, short

_MOST_PROCESSES = 10**6
_KUBERNETES = "tcp://"


@dataclass(frozen=True)
class LaunchEnvironment:
    """The rank, the world size and the store's address that a launcher gave this process.

    Attributes:
        rank: the number of this process among all processes.
        size: the number of processes.
        local_rank: the number of this process on its host.
        host, port: the address of the key-value store.
        hosted: True if the launcher keeps the store, as ``torchrun`` does; False if rank 0 keeps it.
        restart: the number of times that the launcher has restarted the processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 29500
    hosted: bool = False
    restart: int = 0


@dataclass(frozen=True)
class _Names:
    """The names of a launcher's variables."""

    rank: str
    size: str
    local_rank: str
    local_size: str = ""


_TORCHRUN = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK")
_OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
# MPICH, Intel MPI and MVAPICH. srun may set the first two variables, but never the last two.
_HYDRA = _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# Only srun sets the number of a step's tasks. A batch script outside srun is a single process.
_SLURM = _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def read_launch_environment(environment: Mapping[str, str]) -> LaunchEnvironment:
    """Reads the launcher's variables. Without any, this is a single process.

    ``torchrun``'s variables take precedence over MPI's, and MPI's over SLURM's: ``srun`` may have started ``mpirun``.

    Raises:
        LoopfastError: a variable is missing or cannot be used; the message names it, its value and what is allowed.
    """
    if _is_set(_TORCHRUN, environment) and not _is_single(environment):
        restart = "TORCHELASTIC_RESTART_COUNT"
        return LaunchEnvironment(
            *_ranks(_TORCHRUN, environment),
            host=_host(environment.get("MASTER_ADDR"), _TORCHRUN),
            port=_port(environment),
            hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart=_number(environment, restart, 0, 10**9) if environment.get(restart) else 0,
        )
    if _is_set(_OPEN_MPI, environment):
        job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
        return _read_mpi(_OPEN_MPI, environment, job)
    if _is_set(_HYDRA, environment) and "MPI_LOCALRANKID" in environment:
        return _read_mpi(_HYDRA, environment, None)
    if _is_set(_SLURM, environment):
        host = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
        job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
        return LaunchEnvironment(
            *_ranks(_SLURM, environment), host=_host(host, _SLURM), port=_port(environment, job=job)
        )
    return LaunchEnvironment()


def _is_set(names: _Names, environment: Mapping[str, str]) -> bool:
    """Returns whether both variables exist and one of them is not empty."""
    found = [environment.get(name) for name in (names.rank, names.size)]
    return None not in found and any(found)


def _is_single(environment: Mapping[str, str]) -> bool:
    """Returns whether these are the variables that some containers set for every program."""
    port = environment.get("MASTER_PORT", "")
    return environment["WORLD_SIZE"] == "1" and (not port or port.startswith(_KUBERNETES))


def _ranks(names: _Names, environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Returns rank, size and local rank."""
    size = _number(environment, names.size, 1, _MOST_PROCESSES)
    beside = f", as {names.size} is {size}"
    rank, local_rank = (
        _number(environment, name, 0, size - 1, beside) for name in (names.rank, names.local_rank)
    )
    return rank, size, local_rank


def _read_mpi(names: _Names, environment: Mapping[str, str], job: str | None) -> LaunchEnvironment:
    ranks = _ranks(names, environment)
    size = ranks[1]
    local_size = _number(environment, names.local_size, 1, size, f", as {names.size} is {size}")
    host = environment.get("MASTER_ADDR")
    if not host and local_size < size:
        raise LoopfastError(
            f"{names.local_size} is {local_size} and {names.size} is {size}, so there are processes on other hosts: "
            "set MASTER_ADDR to the address of rank 0's host in all of them"
        )
    if job is None and local_size == size:
        job = _mpi_proxy()
    return LaunchEnvironment(*ranks, host=host or "127.0.0.1", port=_port(environment, job=job))


def _number(environment: Mapping[str, str], name: str, least: int, most: int, beside: str = "") -> int:
    """Reads a whole number from a variable.

    Raises:
        LoopfastError: the value is not made of ASCII digits, or is out of bounds.
    """
    value = environment.get(name)
    if value is not None and re.fullmatch("[0-9]{1,10}", value) and least <= int(value) <= most:
        return int(value)
    found = "missing" if value is None else repr(short(value))
    raise LoopfastError(
        f"the launcher's variable {name} is {found}; allowed: a whole number from {least} to {most}{beside}"
    )


def _host(found: str | None, names: _Names) -> str:
    if not found:
        raise LoopfastError(f"the launcher's variable MASTER_ADDR is missing beside {names.rank}")
    return found


def _port(environment: Mapping[str, str], *, job: str | None = None) -> int:
    """Reads ``MASTER_PORT``. A job without one gets a port from its name, as jobs share hosts."""
    value = environment.get("MASTER_PORT")
    if job is not None and not value:
        return 20000 + zlib.crc32(job.encode("utf-8", "surrogateescape")) % 40000
    if value is not None and value.startswith(_KUBERNETES):
        raise LoopfastError(
            f"the launcher's variable MASTER_PORT is {value!r}, as Kubernetes sets it for a service that is called "
            "master; allowed: a whole number from 1 to 65535"
        )
    return _number(environment, "MASTER_PORT", 1, 65535)


def _mpi_proxy() -> str:
    """Returns the process number of Hydra's proxy on this host, which identifies the job: Hydra gives jobs no name.

    The proxy is this process's parent, or the parent of a script between them.
    """
    ancestor = parent = os.getppid()
    while ancestor > 1:
        try:
            status = Path(f"/proc/{ancestor}/stat").read_text("utf-8", "replace")
        except OSError:  # macOS has no such file.
            break
        name, _, rest = status.rpartition(")")
        if "pmi_proxy" in name:
            return str(ancestor)
        ancestor = int(rest.split()[1])
    return str(parent)


def _first_host(nodes: str) -> str:
    """Returns the first host of SLURM's list of nodes, such as ``gpu[03-05,9],login``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    return "" if match is None else match[1] + (match[2] or "") + match[3]
