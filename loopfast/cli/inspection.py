"""Commands that describe a run before it starts, its time, and the installation."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from loopfast.cli.app import app
from loopfast.cli.options import ConfigArgument, ConfigOption, Overrides, Quiet, load
from loopfast.errors import LoopfastError
from loopfast.system.files import writing
from loopfast.system.libraries import quiet_libraries


@app.command(
    epilog="**Example:** `loopfast schedule --config tiny --set rollout.steps=20 --plot schedule.png`"
)
def schedule(
    config: ConfigArgument = None,
    name: ConfigOption = "",
    overrides: Overrides = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a plot, as PNG, SVG or PDF by the file's ending."),
    ] = None,
) -> None:
    """Show a sampler's transitions, and which of them are trained on.

    Each step draws the next latent from a normal distribution with mean `a·latent + b·model output` and standard
    deviation `σ`. The sensitivity `(b/σ)²` says how strongly the log-probability depends on the model output. Steps far
    above the others dominate the gradient, so `train.steps: auto` excludes them.
    """
    settings = load(name, overrides)
    quiet_libraries()
    from loopfast.policies import load_schedule, scheduler_notes
    from loopfast.rollout import stochastic_steps

    steps = stochastic_steps(
        load_schedule(settings.model, settings.rollout),
        settings.rollout.stochastic_steps,
        settings.train.steps,
    )
    transitions, trained = steps.schedule, steps.trained_steps
    table = Table("step", "timestep", "a", "b", "sigma", "(b/sigma)^2", "trained")
    columns = (transitions.timesteps, transitions.table64, transitions.sensitivity)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for step, (timestep, (a, b, sigma), sensitivity) in enumerate(rows):
        numbers = (f"{timestep:g}", f"{a:.5f}", f"{b:.5f}", f"{sigma:.5f}", f"{sensitivity:.3g}")
        table.add_row(str(step), *numbers, "yes" if step in trained else "no")
    Console().print(table)
    for note in scheduler_notes(settings.model):
        print(note)
    counts = f"{len(trained)} of {settings.rollout.steps} steps are trained on"
    window = f", {steps.window} in a row of them in an iteration, the others without noise"
    print(f"train.steps {settings.train.steps}: {counts}{window if steps.window else ''}")
    if plot is not None:
        from loopfast.reporting import schedule_plot

        print(schedule_plot(transitions, trained, plot))


@app.command(
    epilog="**Example:** `loopfast plan --config sd15-jpeg --gpus 4 --memory 24GiB --set model.tune=full`"
)
def plan(
    config: ConfigArgument = None,
    name: ConfigOption = "",
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Number of processes, one per device; default: 1.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory per device, such as 24GiB; default: that of the card."),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help="rtx3060, rtx3090, rtx4090, a100-40, a100-80, h100-80 or cpu; default: this machine's, or the "
            "smallest with --memory.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model in place of model.pretrained: sd15, sd21, sdxl, sd35-medium, flux-dev, ...",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Estimate the memory and time of a run before anything is loaded.

    It reads the configurations of the run and of its model, no weights. It shows memory by purpose and ZeRO stage,
    whether it fits, the largest sizes that fit, the cheapest changes that make it fit, and the seconds per iteration up
    to 512 GPUs, from counted operations and the card's datasheet.
    """
    settings = load(name, overrides)
    quiet_libraries()
    from loopfast.planning import as_dict, as_tables
    from loopfast.planning import plan as make_plan

    found = make_plan(settings, gpus=gpus, memory=memory, card=card, model=model)
    if as_json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        Console().print(as_tables(found))


@app.command(
    epilog="**Example:** `loopfast profile --config tiny --iterations 2 --set rollout.guidance_scale=3`"
)
def profile(
    config: ConfigArgument = None,
    name: ConfigOption = "",
    overrides: Overrides = None,
    iterations: Annotated[
        int,
        typer.Option(
            "--iterations", "-n", metavar="N", min=1, help="Number of iterations to time, and again to trace."
        ),
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder for the results; default: profile-<run.name>."
        ),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace/--no-trace",
            help="Time and trace the iterations, or only run them in the NVTX range `profile`, for an external "
            "profiler.",
        ),
    ] = True,
    nsys: Annotated[
        bool, typer.Option("--nsys", help="Run under Nsight Systems instead of torch's profiler.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Show where an iteration spends its time.

    Samples and updates for some iterations without writing a run: one iteration to warm up, then N that are timed, then
    N under torch's profiler. Prints the seconds of each phase, the share outside model calls, and the time of every
    operator and kernel. Writes them to `profile.md` and `profile.json`, and a Chrome trace.
    """
    settings = load(name, overrides)
    folder = output or Path(f"profile-{settings.run.name}")
    from loopfast.profiling import nsys_command

    command = nsys_command(name, overrides or [], iterations=iterations, output=folder)
    if nsys:
        replace_process(command, "--nsys needs Nsight Systems", folder)
    quiet_libraries()
    from loopfast.planning.profile import profile as run
    from loopfast.run.console import Display

    with Display(quiet=quiet) as display:
        found = run(settings, iterations=iterations, output=folder, trace=trace, display=display)
    if found is not None:
        print(found.as_markdown(), *found.files, "", "With Nsight Systems:", shlex.join(command), sep="\n")


@app.command()
def doctor() -> None:
    """Show versions, devices and backends, and how to install what is missing."""
    from loopfast.system.doctor import examine

    print(examine())


def replace_process(command: list[str], needed: str, folder: Path) -> NoReturn:
    """Replaces this process by another program, which writes to a folder."""
    program = shutil.which(command[0])
    if program is None:
        raise LoopfastError(f"{needed}, and no {command[0]} is on the PATH")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    os.execv(program, command)
