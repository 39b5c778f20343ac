"""Commands for trained models and finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from loopfast.cli.app import app
from loopfast.cli.options import Quiet, Seed
from loopfast.errors import ConfigError, one_line
from loopfast.system.libraries import quiet_libraries

_BENCHMARK_EXAMPLES = """
**Examples**

* `loopfast benchmark runs/tiny embedded --images-per-prompt 4`

* `loopfast benchmark runs/color t2i-compbench --prompts-dir t2i-compbench --category color --metric-option
blip_vqa.weights=models/blip-vqa`
"""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or of an exported LoRA.")]
Pretrained = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Base model of a LoRA whose card does not name it: a folder, a file or a hub name.",
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Denoising steps; default: the run's, or 50.")
]
Eta = Annotated[
    float | None,
    typer.Option(metavar="X", min=0, max=1, help="Noise of the DDIM sampler; default: the run's, or 0."),
]
NoiseLevel = Annotated[
    float | None,
    typer.Option(metavar="X", min=0, help="Noise of the flow-matching sampler; default: the run's, or 0."),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(metavar="X", min=0, help="Classifier-free guidance; default: the run's, or 7.5."),
]


@app.command(epilog='**Example:** `loopfast sample runs/tiny "a red circle and a blue square" --count 8`')
def sample(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Folder of a run, an exported LoRA or a pipeline; embedded; or a hub name.",
        ),
    ],
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts to draw.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="PROMPT", help="A further prompt. May be given several times."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="More prompts: a file (.txt, .jsonl, .json, .csv, .tsv), datasets:NAME, module:function, or "
            "embedded:CATEGORY.",
        ),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Images per prompt.")] = 4,
    seed: Seed = 0,
    steps: Steps = None,
    eta: Eta = None,
    noise_level: NoiseLevel = None,
    guidance_scale: GuidanceScale = None,
    base: Annotated[
        bool,
        typer.Option(
            "--base/--no-base",
            help="For a run or a LoRA, also draw with the base model from the same noise, and show both in grid.png.",
        ),
    ] = True,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the images.")
    ] = Path("samples"),
    pretrained: Pretrained = None,
    quiet: Quiet = False,
) -> None:
    """Draw images with a trained model, or with any pipeline."""
    wanted = [*(texts or []), *(more or [])]
    if prompts is not None:
        from loopfast.prompts import load_prompts

        wanted += [prompt.text for prompt in load_prompts(prompts)]
    for text in wanted:
        # Python turns bytes of a command line that are not UTF-8 into these characters
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"prompt {one_line(text)!r}: allowed: text in UTF-8")
    if not wanted:
        raise ConfigError("nothing to draw; give a prompt, or a source of prompts with --prompts")
    quiet_libraries()
    from loopfast.evaluation import sample_images
    from loopfast.run.console import Display

    with Display(quiet=quiet) as display:
        paths = sample_images(
            target,
            wanted,
            pretrained=pretrained,
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


class _Evaluate(TyperCommand):
    """The command `eval`. Its older spelling with `--benchmark` calls the command `benchmark`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        benchmark: TyperCommand = parent.command.commands["benchmark"]
        given = dict.fromkeys(argument.partition("=")[0] for argument in args)
        if "--benchmark" not in given:
            own, other = (
                {name for p in c.params for name in p.opts + p.secondary_opts} for c in (self, benchmark)
            )
            if misplaced := [name for name in given if name in other - own]:
                raise ConfigError(
                    f"{', '.join(misplaced)}: only with --benchmark, or in `loopfast benchmark`"
                )
            return super().make_context(info_name, args, parent, **extra)
        if "--prompts" in given:
            raise ConfigError("--prompts: not with --benchmark, which has prompts of its own")
        return benchmark.make_context(benchmark.name, args, parent, **extra)


@app.command(
    name="eval", cls=_Evaluate, epilog="**Example:** `loopfast eval runs/tiny --prompts embedded:all-heldout`"
)
def evaluate(
    target: Run,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Source of prompts; default: the run's evaluation prompts."),
    ] = None,
    images_per_prompt: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Images per prompt; default: the run's number."),
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="JSON file for the scores."),
    ] = None,
    pretrained: Pretrained = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate the reward of a run's model on its evaluation prompts, or on others.

    Deprecated: `loopfast eval RUN --benchmark NAME`, with the options of `loopfast benchmark`, is the older spelling of
    `loopfast benchmark RUN NAME`.
    """
    quiet_libraries()
    from loopfast.evaluation import evaluate_checkpoint
    from loopfast.run.console import Display

    with Display(quiet=quiet) as display:
        result = evaluate_checkpoint(
            target,
            pretrained=pretrained,
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


@app.command(epilog=_BENCHMARK_EXAMPLES)
def benchmark(
    target: Run,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The benchmark: t2i-compbench or embedded.")
    ] = None,
    option: Annotated[
        str | None, typer.Option("--benchmark", metavar="NAME", help="The benchmark, as an option.")
    ] = None,
    prompts_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder with T2I-CompBench's files, such as color_val.txt."),
    ] = None,
    categories: Annotated[
        list[str] | None,
        typer.Option(
            "--category",
            metavar="NAME",
            help="Category of the benchmark. May be given several times; default: all.",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="CATEGORY=REWARD",
            help="Score a category with another reward: its name, or YAML such as {name: ..., options: {...}}.",
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
    images_per_prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Images per prompt.")] = 10,
    limit_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N prompts of each category.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    eta: Eta = None,
    noise_level: NoiseLevel = None,
    guidance_scale: GuidanceScale = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Also evaluate the base model.")] = True,
    keep_images: Annotated[
        int, typer.Option(metavar="N", min=0, help="Keep the first N images of each prompt.")
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for scores and results; default: benchmarks/NAME in the run's folder.",
        ),
    ] = None,
    pretrained: Pretrained = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a run's model and the base model on a benchmark.

    A stopped benchmark continues where it stopped, and all models draw from the same noise. The folder contains the
    scores of each image, `results.json`, and `results.md`: the paper's table with 95 % confidence intervals.
    """
    chosen = option if name is None else name
    if chosen is None or (name is not None and option is not None):
        raise ConfigError("give one benchmark: t2i-compbench or embedded")
    quiet_libraries()
    from loopfast.evaluation import BenchmarkChoice, SamplingPlan, benchmark_table, evaluate_benchmark
    from loopfast.run.console import Display

    choice = BenchmarkChoice(chosen, prompts_dir, categories or (), metrics or (), metric_options or ())
    plan = SamplingPlan(images_per_prompt, seed, limit_prompts, keep_images)
    with Display(quiet=quiet) as display:
        found = evaluate_benchmark(
            target,
            choice,
            plan,
            steps=steps,
            eta=eta,
            noise_level=noise_level,
            guidance_scale=guidance_scale,
            pretrained=pretrained,
            base=base,
            output=output,
            display=display,
        )
    Console().print(benchmark_table(found))


@app.command(epilog="**Example:** `loopfast compare runs/loop runs/ppo runs/grpo --output comparison`")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="A folder for the tables and plots of the rewards."
        ),
    ] = None,
) -> None:
    """Compare several runs.

    Each run has a row with its algorithm, K, iterations, images and time, and each reward at the first, the last and
    the best evaluation. Tables of benchmarks follow (`loopfast benchmark`). `--output` also writes Markdown, JSON and
    plots against iterations, images and seconds.
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
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="New or empty folder to write.")],
    form: Annotated[
        Literal["lora", "full"] | None,
        typer.Option("--format", help="An adapter, or a whole pipeline; default: the form that was trained."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to the weights, and write a whole pipeline.")
    ] = False,
    best: Annotated[
        bool,
        typer.Option("--best", help="Export the checkpoint with the best evaluation, not the newest."),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's trained model in diffusers' form, with a model card."""
    quiet_libraries()
    from loopfast.exporting import export_run
    from loopfast.run.console import Display

    with Display(quiet=quiet) as display:
        print(export_run(run, to, form=form, merge=merge, best=best, display=display))


@app.command(epilog="**Example:** `loopfast report runs/tiny --picture tiny.png`")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw the run in one picture: images before and after, and the reward."
        ),
    ] = None,
) -> None:
    """Write a run's `report.html`, also before the run has finished."""
    from loopfast.reporting import run_picture, write_report

    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{str(run)!r} is not a run's folder: there is no config.yaml in it")
    print(write_report(run))
    if picture is not None:
        print(run_picture(run, picture))
