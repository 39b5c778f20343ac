"""Where a launcher has put this process: ``torchrun``, ``deepspeed``, ``loopfast launch``, ``mpirun`` or ``srun``.

All variables of launchers are read here, and nowhere else in the package.
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
class Place:
    """Where a launcher has put this process.

    Attributes:
        rank, size: its number among all processes, and how many there are.
        local_rank: its number on this host.
        host, port: of the group's store.
        hosted: whether the launcher keeps the store (``torchrun``); otherwise rank 0 does.
        restart: how many times the launcher has started the group anew.
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
    """What a launcher calls its variables."""

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
# of MPICH, Intel MPI and MVAPICH; the last two variables tell it from srun, which may set the first two
_HYDRA = _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# only srun sets the number of a step's tasks: a batch script that is not run by it stands alone
_SLURM = _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def find_place(environment: Mapping[str, str]) -> Place:
    """What the launcher's variables say; a place alone where there are none.

    ``torchrun``'s variables count before those of MPI, and these before SLURM's: ``srun`` may have started ``mpirun``.

    Raises:
        LoopfastError: a variable is missing or cannot be used; the message names it, its value and what is allowed.
    """
    if _started_by(_TORCHRUN, environment) and not _alone(environment):
        restart = "TORCHELASTIC_RESTART_COUNT"
        return Place(
            *_ranks(_TORCHRUN, environment),
            host=_host(environment.get("MASTER_ADDR"), _TORCHRUN),
            port=_port(environment),
            hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart=_number(environment, restart, 0, 10**9) if environment.get(restart) else 0,
        )
    if _started_by(_OPEN_MPI, environment):
        job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
        return _place_in_mpi(_OPEN_MPI, environment, job)
    if _started_by(_HYDRA, environment) and "MPI_LOCALRANKID" in environment:
        return _place_in_mpi(_HYDRA, environment, None)
    if _started_by(_SLURM, environment):
        host = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
        job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
        return Place(*_ranks(_SLURM, environment), host=_host(host, _SLURM), port=_port(environment, job=job))
    return Place()


def _started_by(names: _Names, environment: Mapping[str, str]) -> bool:
    """Whether both variables are there, and one of them says something."""
    found = [environment.get(name) for name in (names.rank, names.size)]
    return None not in found and any(found)


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether the variables are those that some containers set for every program."""
    port = environment.get("MASTER_PORT", "")
    return environment["WORLD_SIZE"] == "1" and (not port or port.startswith(_KUBERNETES))


def _ranks(names: _Names, environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, size and local rank."""
    size = _number(environment, names.size, 1, _MOST_PROCESSES)
    beside = f", as {names.size} is {size}"
    rank, local_rank = (
        _number(environment, name, 0, size - 1, beside) for name in (names.rank, names.local_rank)
    )
    return rank, size, local_rank


def _place_in_mpi(names: _Names, environment: Mapping[str, str], job: str | None) -> Place:
    ranks = _ranks(names, environment)
    size = ranks[1]
    here = _number(environment, names.local_size, 1, size, f", as {names.size} is {size}")
    host = environment.get("MASTER_ADDR")
    if not host and here < size:
        raise LoopfastError(
            f"{names.local_size} is {here} and {names.size} is {size}, so there are processes on other hosts: set "
            "MASTER_ADDR to the address of rank 0's host in all of them"
        )
    if job is None and here == size:
        job = _proxy()
    return Place(*ranks, host=host or "127.0.0.1", port=_port(environment, job=job))


def _number(environment: Mapping[str, str], name: str, least: int, most: int, beside: str = "") -> int:
    """A variable's number.

    Raises:
        LoopfastError: it is something else than ASCII digits, or out of bounds.
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
    """``MASTER_PORT``, or, where it may be missing, a number that is the job's: jobs share hosts."""
    value = environment.get("MASTER_PORT")
    if job is not None and not value:
        return 20000 + zlib.crc32(job.encode("utf-8", "surrogateescape")) % 40000
    if value is not None and value.startswith(_KUBERNETES):
        raise LoopfastError(
            f"the launcher's variable MASTER_PORT is {value!r}, as Kubernetes sets it for a service that is called "
            "master; allowed: a whole number from 1 to 65535"
        )
    return _number(environment, "MASTER_PORT", 1, 65535)


def _proxy() -> str:
    """The process of MPI that has started this host's part of a job, by its number: Hydra gives jobs no name.

    It is this process's parent, or further up where a script stands between.
    """
    ancestor = parent = os.getppid()
    while ancestor > 1:
        try:
            status = Path(f"/proc/{ancestor}/stat").read_text("utf-8", "replace")
        except OSError:  # there is no such file on macOS
            break
        name, _, rest = status.rpartition(")")
        if "pmi_proxy" in name:
            return str(ancestor)
        ancestor = int(rest.split()[1])
    return str(parent)


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes, such as ``gpu[03-05,9],login``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    return "" if match is None else match[1] + (match[2] or "") + match[3]
