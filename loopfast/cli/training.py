"""Commands that train."""

from __future__ import annotations

from typing import Annotated

import typer

from loopfast.cli.app import app
from loopfast.cli.options import ConfigOption, Overrides, Quiet, Resume, load, quiet_libraries


@app.command(
    epilog="**Example:** `loopfast train --config tiny --set algorithm.name=ppo --set run.name=tiny-ppo`"
)
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a model.

    Everything the run makes goes to a folder of its own, `runs/<name>` unless the configuration says
    otherwise: checkpoints, metrics, images and `report.html`. Ctrl-C finishes the update at hand, saves and
    stops; `--resume auto` goes on from there as if nothing had happened.
    """
    settings = load(config, overrides)
    quiet_libraries()
    from loopfast.run.console import Display
    from loopfast.training.train import train as run

    with Display(quiet=quiet) as display:
        run(settings, resume=resume, display=display)


@app.command(
    epilog="**Example:** `loopfast launch --nproc 4 --max-restarts 3 --config mine.yaml --set distributed.zero_stage=3`"
)
def launch(
    processes: Annotated[
        int, typer.Option("--nproc", "-n", metavar="N", min=1, help="Processes, normally one for each GPU.")
    ],
    config: ConfigOption,
    overrides: Overrides = None,
    restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            metavar="N",
            min=0,
            help="Start again from the last checkpoint, at most so often.",
        ),
    ] = 0,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a model with several processes on this host.

    A configuration means the same whatever their number. On many hosts, or where a launcher is given, `loopfast train`
    joins what `torchrun -m loopfast train ...`, `deepspeed --module loopfast train ...`, `mpirun` or `srun` has
    started.
    """
    settings = load(config, overrides)
    from loopfast.distributed.launch import launch as run
    from loopfast.engines import require_type
    from loopfast.system.device import torch_device

    require_type(settings, torch_device(settings.model.device).type)
    arguments = ["train", "--config", config]
    arguments += [part for override in overrides or [] for part in ("--set", override)]
    arguments += [*(["--resume", resume] if resume else []), *(["--quiet"] if quiet else [])]
    run(arguments, processes=processes, restarts=restarts)
