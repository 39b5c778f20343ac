"""The commands that train."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from loopfast.cli.app import app
from loopfast.cli.options import ConfigArgument, ConfigOption, Overrides, Quiet, Resume, load
from loopfast.errors import RunExistsError


@app.command(
    epilog="**Example:** `loopfast train --config tiny --set algorithm.name=ppo --set run.name=tiny-ppo`"
)
def train(
    config: ConfigArgument = None,
    name: ConfigOption = "",
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a model.

    The run's folder, by default `runs/<name>`, contains its checkpoints, metrics, images and `report.html`. Ctrl-C
    finishes the current update, saves the run and stops it. `--resume auto` continues from there, with the same result
    as without a stop.
    """
    settings = load(name, overrides)
    from loopfast.api import train as run

    with _command_in_error("train", *_arguments(name, overrides, None, quiet)):
        run(settings, resume=resume, quiet=quiet)


@app.command(
    epilog="**Example:** `loopfast launch --nproc 4 --max-restarts 3 --config mine.yaml --set distributed.zero_stage=3`"
)
def launch(
    processes: Annotated[
        int,
        typer.Option("--nproc", "-n", metavar="N", min=1, help="Number of processes, usually one per GPU."),
    ],
    config: ConfigArgument = None,
    name: ConfigOption = "",
    overrides: Overrides = None,
    restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            metavar="N",
            min=0,
            help="Restart from the last checkpoint after a failure, at most N times.",
        ),
    ] = 0,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a model with several processes on this host.

    A configuration means the same for every number of processes. On several hosts, or with another launcher, start
    `loopfast train` by `torchrun -m loopfast train ...`, `deepspeed --module loopfast train ...`, `mpirun` or `srun`.
    """
    settings = load(name, overrides)
    from loopfast.distributed.launch import launch as run
    from loopfast.engines import require_type
    from loopfast.run.folder import RunFolder
    from loopfast.system.device import torch_device

    device = torch_device(settings.model.device).type
    require_type(settings.model.dtype, settings.distributed.zero_stage, device)
    arguments = _arguments(name, overrides, resume, quiet)
    with _command_in_error("launch", "--nproc", str(processes), *arguments):
        if resume is None:
            RunFolder(settings).require_unused()
        run(["train", *arguments], processes=processes, restarts=restarts)


def _arguments(name: str, overrides: list[str] | None, resume: str | None, quiet: bool) -> list[str]:
    """Returns the part of a command line that selects the run."""
    sets = [part for override in overrides or [] for part in ("--set", override)]
    resumed = ["--resume", resume] if resume else []
    return ["--config", name, *sets, *resumed, *(["--quiet"] if quiet else [])]


@contextmanager
def _command_in_error(*command: str) -> Iterator[None]:
    """Context that adds to the error about an existing run the command that starts another one."""
    try:
        yield
    except RunExistsError as error:
        again = shlex.join(["loopfast", *command, "--set", f"run.name={error.free_name}"])
        raise error.advising("--resume auto", again) from None
