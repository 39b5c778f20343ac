"""The command line. Heavy imports happen inside the commands, so that help and errors are immediate."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

import loopfast
from loopfast.errors import ConfigError, Interrupted, LoopfastError
from loopfast.files import writing

if TYPE_CHECKING:
    from loopfast.config import Config

__all__ = ["app"]


class _Commands(TyperGroup):
    """Ctrl-C outside of training, which saves first, ends with the code that shells expect."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None


_EXAMPLES = """
**Examples**

* `loopfast train --config tiny`

* `loopfast train --config tiny --set run.seed=1 --set run.name=tiny-1`

* `loopfast train --config runs/tiny/config.yaml --resume auto`

* `loopfast sample runs/tiny "a red circle and a blue square"`

* `loopfast config show tiny > mine.yaml`
"""

app = typer.Typer(
    cls=_Commands,
    help="Reinforcement learning for diffusion models: LOOP, PPO and their relatives.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    help="Print, check and document configurations.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.add_typer(config_app, name="config")

_ConfigOption = Annotated[
    str,
    typer.Option(
        "--config", "-c", metavar="NAME|FILE", help="A recipe's name, such as tiny, or a YAML file."
    ),
]
_ConfigArgument = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A recipe's name, such as tiny, or a YAML file.")
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one key, such as train.learning_rate=1e-4. May be given several times.",
    ),
]
_Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Seed of the noise; the same seed, the same images.")
]
_Resume = Annotated[
    str | None,
    typer.Option(
        metavar="auto|PATH",
        help="Go on from a checkpoint: the newest good one (auto; none yet: start), or that at PATH.",
    ),
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loopfast {loopfast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    # what the launcher `deepspeed` puts before a program's own arguments; it is in the environment, too
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Read what stands before the command."""


@app.command(
    epilog="**Example:** `loopfast train --config tiny --set algorithm.name=ppo --set run.name=tiny-ppo`"
)
def train(
    config: _ConfigOption,
    overrides: _Overrides = None,
    resume: _Resume = None,
    quiet: _Quiet = False,
) -> None:
    """Train a model.

    Everything the run makes goes to a folder of its own, `runs/<name>` unless the configuration says
    otherwise: checkpoints, metrics, images and `report.html`. Ctrl-C finishes the update at hand, saves and
    stops; `--resume auto` goes on from there as if nothing had happened.
    """
    settings = _load(config, overrides)
    _quiet_libraries()
    from loopfast.console import Display
    from loopfast.train import train as run

    with Display(quiet=quiet) as display:
        run(settings, resume=resume, display=display)


@app.command(
    epilog="**Example:** `loopfast launch --nproc 4 --max-restarts 3 --config mine.yaml --set distributed.zero_stage=3`"
)
def launch(
    processes: Annotated[
        int, typer.Option("--nproc", "-n", metavar="N", min=1, help="Processes, normally one for each GPU.")
    ],
    config: _ConfigOption,
    overrides: _Overrides = None,
    restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts",
            metavar="N",
            min=0,
            help="Start again from the last checkpoint, at most so often.",
        ),
    ] = 0,
    resume: _Resume = None,
    quiet: _Quiet = False,
) -> None:
    """Train a model with several processes on this host.

    A configuration means the same whatever their number. On many hosts, or where a launcher is given, `loopfast train`
    joins what `torchrun -m loopfast train ...`, `deepspeed --module loopfast train ...` or `srun` has started.
    """
    _load(config, overrides)
    from loopfast.launch import launch as run

    arguments = ["train", "--config", config]
    arguments += [part for override in overrides or [] for part in ("--set", override)]
    arguments += [*(["--resume", resume] if resume else []), *(["--quiet"] if quiet else [])]
    run(arguments, processes=processes, restarts=restarts)


@app.command(epilog='**Example:** `loopfast sample runs/tiny "a red circle and a blue square" --count 8`')
def sample(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run's folder, a pipeline's folder, embedded, or a hub name."
        ),
    ],
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="PROMPT", help="What to draw, too. May be given several times."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="More prompts: embedded:CATEGORY, a text file, or module:function."
        ),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Images for each prompt.")] = 4,
    seed: _Seed = 0,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Denoising steps; default: the run's, or 50.")
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, max=1, help="Noise of the DDIM sampler; default: the run's, or 0."),
    ] = None,
    noise_level: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, help="Noise of the flow-matching sampler; default: the run's, or 0."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Classifier-free guidance; default: the run's, or 7.5."),
    ] = None,
    base: Annotated[
        bool,
        typer.Option(
            "--base/--no-base",
            help="With a run, also draw with the model before training, on the same noise, and show both in grid.png.",
        ),
    ] = True,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the images.")
    ] = Path("samples"),
    quiet: _Quiet = False,
) -> None:
    """Draw images with a trained model, or with any pipeline."""
    wanted = [*(texts or []), *(more or [])]
    if prompts is not None:
        from loopfast.prompts import load_prompts

        wanted += [prompt.text for prompt in load_prompts(prompts)]
    if not wanted:
        raise ConfigError("nothing to draw; give a prompt, or a source of prompts with --prompts")
    _quiet_libraries()
    from loopfast.console import Display
    from loopfast.evaluation import sample_images

    with Display(quiet=quiet) as display:
        paths = sample_images(
            target,
            wanted,
            count=count,
            seed=seed,
            steps=steps,
            eta=eta,
            noise_level=noise_level,
            guidance_scale=guidance_scale,
            base=base,
            output=output,
            display=display,
        )
    print(f"{len(paths)} file(s) in {output}")


_EVAL_EXAMPLES = """
**Examples**

* `loopfast eval runs/tiny --prompts embedded:all-heldout`

* `loopfast eval runs/tiny --benchmark embedded --images-per-prompt 4`

* `loopfast eval runs/color --benchmark t2i-compbench --prompts-dir t2i-compbench --category color --metric-option
blip_vqa.weights=models/blip-vqa`
"""


@app.command(name="eval", epilog=_EVAL_EXAMPLES)
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    prompts: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Prompts to draw; default: those the run was evaluated on."),
    ] = None,
    images_per_prompt: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Images for each prompt; default: as in the run, of a benchmark 10."
        ),
    ] = None,
    seed: _Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The file for the scores as JSON; of a benchmark the folder, default: benchmarks/NAME in the run's.",
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure on t2i-compbench or embedded, beside the base model."),
    ] = None,
    prompts_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of T2I-CompBench's files, such as color_val.txt."),
    ] = None,
    categories: Annotated[
        list[str] | None,
        typer.Option(
            "--category", metavar="NAME", help="Of the benchmark; several times for several; default: all."
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="CATEGORY=REWARD",
            help="Measure a category by another reward: its name, or YAML such as {name: ..., options: {...}}.",
        ),
    ] = None,
    metric_options: Annotated[
        list[str] | None,
        typer.Option(
            "--metric-option",
            metavar="REWARD.KEY=VALUE",
            help="An option of a metric, such as blip_vqa.weights=FOLDER. May be given several times.",
        ),
    ] = None,
    limit_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N prompts of each category.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Denoising steps of a benchmark; default: the run's."),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, max=1, help="DDIM's noise in a benchmark; default: the run's."),
    ] = None,
    noise_level: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="A flow's noise in a benchmark; default: the run's."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Guidance in a benchmark; default: the run's."),
    ] = None,
    base: Annotated[
        bool,
        typer.Option("--base/--no-base", help="Measure the model before training on the benchmark, too."),
    ] = True,
    keep_images: Annotated[
        int, typer.Option(metavar="N", min=0, help="Keep the first N images of each prompt of a benchmark.")
    ] = 0,
    quiet: _Quiet = False,
) -> None:
    """Measure the reward of a run's model, or what it and the base model reach on a benchmark.

    A benchmark goes on where it was stopped, and draws every model's images from the same noise. Its folder has the
    scores of each image, `results.json`, and `results.md`: the paper's table with 95 % confidence intervals.
    """
    for_benchmarks = {
        "--prompts-dir": prompts_dir,
        "--category": categories or None,
        "--metric": metrics or None,
        "--metric-option": metric_options or None,
        "--limit-prompts": limit_prompts,
        "--steps": steps,
        "--eta": eta,
        "--noise-level": noise_level,
        "--guidance-scale": guidance_scale,
        "--no-base": None if base else True,
        "--keep-images": keep_images or None,
    }
    given = [name for name, value in for_benchmarks.items() if value is not None]
    if benchmark is None and given:
        raise ConfigError(f"{', '.join(given)}: only with --benchmark")
    if benchmark is not None and prompts is not None:
        raise ConfigError("--prompts: not with --benchmark, which has prompts of its own")
    _quiet_libraries()
    if benchmark is not None:
        from loopfast.console import Display
        from loopfast.evaluation import benchmark_table, evaluate_benchmark

        with Display(quiet=quiet) as display:
            found, titles = evaluate_benchmark(
                target,
                benchmark,
                prompts_dir=prompts_dir,
                categories=categories or [],
                metrics=metrics or [],
                metric_options=metric_options or [],
                images_per_prompt=images_per_prompt,
                limit_prompts=limit_prompts,
                steps=steps,
                eta=eta,
                noise_level=noise_level,
                guidance_scale=guidance_scale,
                base=base,
                keep_images=keep_images,
                seed=seed,
                output=output,
                display=display,
            )
        Console().print(benchmark_table(found, titles))
        return
    from loopfast.console import Display
    from loopfast.evaluation import evaluate_checkpoint

    with Display(quiet=quiet) as display:
        result = evaluate_checkpoint(
            target,
            prompts=prompts,
            images_per_prompt=images_per_prompt,
            seed=seed,
            output=output,
            display=display,
        )
    parts = list(result["parts"])
    table = Table("category", "reward", *parts, "images")
    rows = {**result["by_category"], "all": {**result, "count": len(result["items"])}}
    for category, scores in rows.items():
        values = (f"{value:.3f}" for value in (scores["reward"], *(scores["parts"][part] for part in parts)))
        table.add_row(category, *values, str(scores["count"]))
    Console().print(table)


@app.command(epilog="**Example:** `loopfast compare runs/loop runs/ppo runs/grpo --output comparison`")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Also write the table and plots of the rewards there."
        ),
    ] = None,
) -> None:
    """Show several runs side by side.

    A row for each: algorithm, K, iterations, images, time, and of its evaluations each reward at the first, the last
    and the best. Then what they reached on benchmarks (`loopfast eval --benchmark`). With `--output` also as Markdown,
    JSON and plots against iterations, images and seconds.
    """
    from loopfast.evaluation import compare_runs, comparison_tables

    summaries, files = compare_runs(runs, output)
    console = Console()
    for table in comparison_tables(summaries):
        console.print(table)
    for file in files:
        print(file)


@app.command(
    epilog="**Example:** `loopfast export runs/tiny-lora --to tiny-lora`, then "
    "`pipeline.load_lora_weights('tiny-lora')` in diffusers"
)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Folder to write, empty or new.")],
    form: Annotated[
        Literal["lora", "full"] | None,
        typer.Option("--format", help="An adapter, or a whole pipeline; default: what was trained."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to the weights and write a whole pipeline.")
    ] = False,
    best: Annotated[
        bool,
        typer.Option("--best", help="From the checkpoint with the best evaluation, not from the newest."),
    ] = False,
    quiet: _Quiet = False,
) -> None:
    """Write what a run has trained in the form that diffusers opens, with a model card."""
    _quiet_libraries()
    from loopfast.console import Display
    from loopfast.exporting import export_run

    with Display(quiet=quiet) as display:
        print(export_run(run, to, form=form, merge=merge, best=best, display=display))


@app.command(epilog="**Example:** `loopfast report runs/tiny --picture tiny.png`")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the run in one picture: before, after, and the reward."),
    ] = None,
) -> None:
    """Write a run's `report.html`, also while it is going on."""
    from loopfast.reporting import run_picture, write_report

    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{str(run)!r} is not a run's folder: there is no config.yaml in it")
    print(write_report(run))
    if picture is not None:
        print(run_picture(run, picture))


@app.command(
    epilog="**Example:** `loopfast schedule --config tiny --set rollout.steps=20 --plot schedule.png`"
)
def schedule(
    config: _ConfigOption,
    overrides: _Overrides = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw it, as PNG, SVG or PDF by the file's ending."),
    ] = None,
) -> None:
    """Show a sampler's transitions and which of them are trained on.

    Each step draws the next latent from a normal distribution with mean `a·latent + b·model output` and
    standard deviation `σ`. The sensitivity `(b/σ)²` is how strongly the log-probability reacts to the model
    output; steps far above the others dominate the gradient, and `train.steps: auto` leaves them out.
    """
    settings = _load(config, overrides)
    _quiet_libraries()
    from loopfast.policies import load_schedule
    from loopfast.rollout import stochastic_steps

    steps = stochastic_steps(
        load_schedule(settings.model, settings.rollout),
        settings.rollout.stochastic_steps,
        settings.train.steps,
    )
    transitions, trained = steps.schedule, steps.trained
    table = Table("step", "timestep", "a", "b", "σ", "(b/σ)²", "trained")
    columns = zip(
        transitions.timesteps.tolist(),
        transitions.table64.tolist(),
        transitions.sensitivity.tolist(),
        strict=True,
    )
    for step, (timestep, (a, b, sigma), sensitivity) in enumerate(columns):
        numbers = (f"{timestep:g}", f"{a:.5f}", f"{b:.5f}", f"{sigma:.5f}", f"{sensitivity:.3g}")
        table.add_row(str(step), *numbers, "yes" if step in trained else "no")
    Console().print(table)
    print(
        f"train.steps {settings.train.steps}: {len(trained)} of {settings.rollout.steps} steps are trained on"
        + (
            f", {steps.window} in a row of them in an iteration, the others without noise"
            if steps.window
            else ""
        )
    )
    if plot is not None:
        from loopfast.reporting import schedule_plot

        print(schedule_plot(transitions, trained, plot))


@app.command(
    epilog="**Example:** `loopfast plan --config sd15-jpeg --gpus 4 --memory 24GiB --set model.tune=full`"
)
def plan(
    config: _ConfigOption,
    overrides: _Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Processes, each with a device; default: 1.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of each device, such as 24GiB; default: the card's."),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help="rtx3060, rtx3090, rtx4090, a100-40, a100-80, h100-80 or cpu; default: what is here, or the smallest "
            "with that memory.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="In place of model.pretrained: sd15, sd21, sdxl, sd35-medium, flux-dev, ..."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a run will hold and how long it takes, before anything is loaded.

    From the configurations of the run and of its model, without weights: memory by purpose and ZeRO stage, whether
    it fits, the largest sizes that do, the cheapest changes that make it fit, seconds an iteration estimated from
    counted operations and the card's datasheet, and how they scale to 512 GPUs.
    """
    settings = _load(config, overrides)
    _quiet_libraries()
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
    config: _ConfigOption,
    overrides: _Overrides = None,
    iterations: Annotated[
        int, typer.Option("--iterations", "-n", metavar="N", min=1, help="Iterations to time, and to trace.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder for what is found; default: profile-<run.name>."
        ),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace/--no-trace",
            help="Time and trace the iterations, or only run them, in the NVTX range `profile`, for a profiler from "
            "outside.",
        ),
    ] = True,
    nsys: Annotated[
        bool, typer.Option("--nsys", help="Run under Nsight Systems instead of torch's profiler.")
    ] = False,
    quiet: _Quiet = False,
) -> None:
    """Show where the time of an iteration goes.

    Runs iterations, sampling and updates, of a configuration, without leaving a run behind: one to warm up, some that
    are timed, and as many under torch's profiler. Prints the seconds of each part, the share outside model calls, and
    the time of every operator and kernel; writes them to `profile.md` and `profile.json`, and a Chrome trace.
    """
    settings = _load(config, overrides)
    folder = output or Path(f"profile-{settings.run.name}")
    from loopfast.profiling import nsys_command

    command = nsys_command(config, overrides or [], iterations=iterations, output=folder)
    if nsys:
        _replace_process(command, "--nsys needs Nsight Systems", folder)
    _quiet_libraries()
    from loopfast.console import Display
    from loopfast.profile_run import profile as run

    with Display(quiet=quiet) as display:
        found = run(settings, iterations=iterations, output=folder, trace=trace, display=display)
    if found is not None:
        print(found.as_markdown(), *found.files, "", "With Nsight Systems:", shlex.join(command), sep="\n")


@app.command(
    "serve-reward",
    epilog="**Example:** `loopfast serve-reward jpeg_compressibility --option quality=80 --port 8000`",
)
def serve_reward(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A reward of the package, or module:function.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of that reward. May be given several times."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            metavar="NAME|FILE",
            help="In place of NAME: the weighted sum of a configuration.",
        ),
    ] = None,
    overrides: _Overrides = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen at; 0.0.0.0: all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen at; 0: any that is free.")
    ] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Environment variable with the token that requests must bear."),
    ] = None,
    max_batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a request.")] = 64,
    max_body: Annotated[int, typer.Option(metavar="MIB", min=1, help="Size of a request.")] = 64,
) -> None:
    """Serve a reward to runs on other machines, which name it `http`.

    The protocol, for servers of your own, is in docs/reward-server.md. Ctrl-C or SIGTERM ends it once what is being
    scored has been answered.
    """
    if (name is None) == (config is None):
        raise ConfigError("give the NAME of one reward, or --config")
    if name is not None:
        from loopfast.config import parse_config

        plain = json.dumps({"model": {"pretrained": "embedded"}, "reward": [{"name": name}]})
        changes = [*(f"reward.0.options.{option}" for option in options or []), *(overrides or [])]
        settings = parse_config(plain, changes, name=f"reward {name}")
    else:
        settings = _load(str(config), overrides)
    token = None
    if token_env is not None and not (token := os.environ.get(token_env)):
        raise ConfigError(f"--token-env: the environment variable {token_env!r} is not set")
    _quiet_libraries()
    from loopfast.rewards import build_rewards
    from loopfast.rewards.serve import serve_rewards

    rewards = build_rewards(settings.reward)
    titles = ", ".join(term.title for term in settings.reward)
    serve_rewards(
        rewards,
        host=host,
        port=port,
        token=token,
        max_batch=max_batch,
        max_body=max_body * 2**20,
        say=lambda text: print(f"{titles}: {text}", flush=True),
    )


@app.command(epilog="**Example:** `loopfast rewards aesthetic`")
def rewards(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A reward, to see its options; default: all.")
    ] = None,
) -> None:
    """List the rewards of the package, or show one and its options."""
    from loopfast.rewards.listing import all_rewards, one_reward

    Console().print(all_rewards() if name is None else one_reward(name))


@config_app.command(
    "show", epilog="**Example:** `loopfast config show tiny --set model.tune=lora > mine.yaml`"
)
def config_show(config: _ConfigArgument, overrides: _Overrides = None) -> None:
    """Print a configuration with every default filled in."""
    from loopfast.config import config_to_yaml

    print(config_to_yaml(_load(config, overrides)), end="")


@config_app.command("check", epilog="**Example:** `loopfast config check mine.yaml`")
def config_check(config: _ConfigArgument, overrides: _Overrides = None) -> None:
    """Check a configuration, its prompts and its rewards without loading any model.

    Names of models on the hub are not looked up; that their weights can be read shows when training starts, before
    anything is sampled.
    """
    settings = _load(config, overrides)
    from loopfast.prompts import load_prompts
    from loopfast.rewards import build_rewards

    sources = dict.fromkeys([settings.prompts.source, settings.evaluation.prompts or settings.prompts.source])
    lines = [f"prompts {source}: {len(load_prompts(source))}" for source in sources]
    rewards = build_rewards(settings.reward, load=False)
    lines += [f"reward {term.name}: weight {term.weight:g}" for term in rewards.terms]
    print(*lines, f"{config}: no problem found", sep="\n")


@config_app.command(
    "deepspeed", epilog="**Example:** `loopfast config deepspeed tiny --set distributed.zero_stage=3`"
)
def config_deepspeed(config: _ConfigArgument, overrides: _Overrides = None) -> None:
    """Print the JSON that DeepSpeed is started with."""
    settings = _load(config, overrides)
    _quiet_libraries()
    from loopfast.engines import deepspeed_settings
    from loopfast.planning.architectures import load_architecture
    from loopfast.policies import torch_device

    parameters = load_architecture(settings.model).denoiser.parameters()
    pinned = torch_device(settings.model.device).type == "cuda"
    print(json.dumps(deepspeed_settings(settings, parameters, pinned=pinned), indent=2))


@config_app.command("schema", epilog="**Example:** `loopfast config schema > loopfast.schema.json`")
def config_schema() -> None:
    """Print the JSON Schema of configurations, for editors: every key, its default and its meaning."""
    from loopfast.config import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """Show versions, devices and backends, and what is missing and how to get it."""
    from loopfast.doctor import examine

    print(examine())


def _load(source: str, overrides: list[str] | None) -> Config:
    from loopfast.config import load_config

    return load_config(source, overrides or [])


def _replace_process(command: list[str], needed: str, folder: Path) -> NoReturn:
    """Goes on as another program, which writes to a folder."""
    program = shutil.which(command[0])
    if program is None:
        raise LoopfastError(f"{needed}, and no {command[0]} is on the PATH")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    os.execv(program, command)


def _quiet_libraries() -> None:
    """Keep the libraries' warnings and loading bars from between our lines, unless asked for by ``-W``."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed, which other libraries import where it is installed, says at length what it found
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
