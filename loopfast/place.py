"""Where a launcher has put this process: ``torchrun``, ``deepspeed``, ``loopfast launch`` or SLURM's ``srun``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loopfast.errors import LoopfastError


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


def find_place(environment: Mapping[str, str]) -> Place:
    """What the launcher's variables say; a place alone where there are none.

    Raises:
        LoopfastError: they are incomplete, or not numbers.
    """
    if environment.get("WORLD_SIZE") == "1" and not environment.get("MASTER_PORT"):
        # some containers set it for every program
        return Place()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        keys = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "port": "MASTER_PORT"}
        host = environment.get("MASTER_ADDR")
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        # only srun sets the number of a step's tasks: a batch script that is not run by it stands alone
        keys = {"rank": "SLURM_PROCID", "size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
        host = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    else:
        return Place()
    numbers = {}
    for field, key in keys.items():
        value = environment.get(key, "")
        if not value.isdigit():
            raise LoopfastError(
                f"the launcher's variable {key} is {value!r}; it has to be a whole number beside "
                f"{keys['rank']}={environment[keys['rank']]}"
            )
        numbers[field] = int(value)
    if not host:
        raise LoopfastError(f"the launcher's variable MASTER_ADDR is missing beside {keys['rank']}")
    if "port" not in numbers:
        # one port a job: jobs share nodes
        number = int(environment.get("SLURM_JOB_ID", "0") or 0) * 7 + int(
            environment.get("SLURM_STEP_ID", "0") or 0
        )
        numbers["port"] = int(environment.get("MASTER_PORT") or 20000 + number % 40000)
    if not 0 <= numbers["rank"] < numbers["size"]:
        raise LoopfastError(
            f"the launcher's {keys['rank']} is {numbers['rank']}, of {numbers['size']} process(es) ({keys['size']})"
        )
    return Place(
        **numbers,
        host=host,
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes, such as ``gpu[03-05,9],login``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    return "" if match is None else match[1] + (match[2] or "") + match[3]
