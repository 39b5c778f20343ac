"""Race TRL's DDPOTrainer against loopfast: ``python -m benchmarks.race COMMAND``.

Results go to ``benchmarks/results/race-<device>.json`` and, as a chart, to the PNG beside it; each command writes its
own part. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.cases import device
from benchmarks.keep import RESULTS
from benchmarks.machine import device_name
from loopfast.config import load_config
from loopfast.policies import load_schedule, trained_steps
from loopfast.prompts import load_prompts

from . import chart, results
from .equal import race_equal_work
from .jobs import LOOPFAST_PYTHON, TRL_PYTHON, RaceError
from .reward import PROMPTS, Field, pace, race_to_reward, sweep
from .settings import WORKS, merged

DEFAULT_BATCHES = (128, 32)


def _say(line: str) -> None:
    print(line, flush=True)


def _overrides(assignments: Sequence[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise RaceError(f"--set {assignment}: allowed: --set section.key=value")
        inner: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            inner = {part: inner}
        changes = merged(changes, inner)
    return changes


def _field(options: argparse.Namespace, found: dict[str, Any]) -> Field:
    recipe = load_config("tiny")
    steps = trained_steps(load_schedule(recipe.model, recipe.rollout), recipe.train.steps)
    equal = found.get("equal_work", {}).get("embedded", {}).get("trl", {})
    return Field(
        options.command,
        [prompt.text for prompt in load_prompts(PROMPTS)],
        recipe.model_dump(mode="json"),
        len(steps),
        tuple(options.trl_batches or equal.get("batches", DEFAULT_BATCHES)),
        options.threads,
        options.fresh,
    )


def _chosen(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, str]:
    chosen = {}
    for trainer in ("trl", "loopfast"):
        named = getattr(options, f"{trainer}_setting")
        if named is None and trainer not in found.get("sweep", {}):
            raise RaceError(
                f"no setting for {trainer}: run the sweep first, or name one with --{trainer}-setting"
            )
        chosen[trainer] = named or found["sweep"][trainer]["chosen"]
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=RESULTS, help="folder of the results")
    timed = argparse.ArgumentParser(add_help=False, parents=[common])
    timed.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of both (all cores)"
    )
    sizes: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("SAMPLED", "TRAINED")}
    runs = argparse.ArgumentParser(add_help=False, parents=[timed])
    runs.add_argument(
        "--trl-batches", **sizes, help="TRL's batch sizes, instead of the best ones of the command equal"
    )
    runs.add_argument("--fresh", action="store_true", help="ignore finished runs of an earlier call")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    equal = commands.add_parser("equal", parents=[timed], help="seconds for the same iteration")
    equal.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    equal.add_argument("--rounds", type=int, default=3, help="runs of each trainer, in turn (3)")
    equal.add_argument("--trl-batches", **sizes, help="TRL's batch sizes, instead of the best of several")
    equal.add_argument("--microbatches", **sizes, help="ours, instead of the best of several")
    equal.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of our configuration; its result is shown beside that of the defaults",
    )

    swept = commands.add_parser("sweep", parents=[runs], help="every setting, on the validation prompts")
    swept.add_argument(
        "--iterations", type=int, default=25, help="iterations of TRL's at its defaults, or as many rows (25)"
    )
    swept.add_argument("--only", choices=("trl", "loopfast"), help="only one trainer")

    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--trl-setting", metavar="NAME", help="instead of the sweep's")
    chosen.add_argument("--loopfast-setting", metavar="NAME", help="instead of the sweep's")
    commands.add_parser(
        "pace",
        parents=[runs, chosen],
        help="seconds of an iteration with either setting, for reward --by-pace",
    )

    reward = commands.add_parser("reward", parents=[runs, chosen], help="seconds to TRL's held-out reward")
    reward.add_argument("--seeds", type=int, default=3)
    reward.add_argument("--trl-seconds", type=float, default=600.0, help="TRL's training time (600)")
    reward.add_argument("--loopfast-seconds", type=float, default=300.0, help="ours, at most (300)")
    reward.add_argument(
        "--by-pace",
        action="store_true",
        help="count iterations and multiply them by the pace, so that the machine may do other work at the same time",
    )
    reward.add_argument(
        "--iterations",
        type=int,
        nargs=2,
        metavar=("TRL", "OURS"),
        help="with --by-pace: iterations to train, at least as many as fit (as many as fit)",
    )

    commands.add_parser("show", parents=[common], help="the tables and the chart of the existing results")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0, or 1 with a message if a run failed or the two trainers cannot be compared.
    """
    options = _parser().parse_args(arguments)
    where = device_name(device())
    path = results.path_for(where, options.folder)
    found = results.load(path)
    try:
        if options.command != "show":
            for python in (TRL_PYTHON, LOOPFAST_PYTHON):
                if not python.exists():
                    raise RaceError(f"{python} is not there: make race installs both environments")
            found = _run(options, found, path, where)
    except RaceError as error:
        print(error, file=sys.stderr)
        return 1
    print(results.report(found) or f"{path} holds no results")
    if found:
        print(f"\n{path}")
    if picture := chart.draw(found, path.with_suffix(".png")):
        print(picture)
    return 0


def _run(options: argparse.Namespace, found: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Runs a command and writes its part of the results at once."""
    today = datetime.now(timezone.utc).date().isoformat()

    def keep(part: dict[str, Any], **machine: Any) -> dict[str, Any]:
        return results.update(path, {"machine": {"device": where, **machine}, **part})

    if options.command == "equal":
        prompts = [prompt.text for prompt in load_prompts(PROMPTS)]
        overrides = _overrides(options.set)
        for name in options.works:
            work = WORKS[name]
            if options.trl_batches:
                work = replace(work, trl_batches=(tuple(options.trl_batches),))
            if options.microbatches:
                work = replace(work, microbatches=(tuple(options.microbatches),))
            label = ", ".join([name, *options.set])
            entry = race_equal_work(
                label,
                work,
                prompts,
                threads=options.threads,
                rounds=options.rounds,
                overrides=overrides,
                say=_say,
            )
            versions = entry.pop("versions")
            found = keep(
                {"equal_work": {label: {**entry, "date": today}}}, threads=options.threads, versions=versions
            )
    elif options.command == "sweep":
        trainers = (options.only,) if options.only else ("trl", "loopfast")
        for trainer, entry in sweep(_field(options, found), options.iterations, trainers, _say).items():
            entry |= {"date": today, "threads": options.threads}
            found = keep({"sweep": {trainer: entry}})
    elif options.command == "pace":
        paces = pace(_field(options, found), _chosen(options, found), _say)
        found = keep({"pace": {**paces, "date": today, "threads": options.threads}})
    else:
        chosen = _chosen(options, found)
        paces = found.get("pace") if options.by_pace else None
        if options.by_pace and any(
            (paces or {}).get(trainer, {}).get("name") != name for trainer, name in chosen.items()
        ):
            raise RaceError(f"no pace of the settings {chosen}: run the command pace first")
        if options.iterations and not options.by_pace:
            raise RaceError("--iterations: only with --by-pace; otherwise the clock decides")
        counts = options.iterations and dict(zip(("trl", "loopfast"), options.iterations, strict=True))
        part = race_to_reward(
            _field(options, found),
            chosen,
            paces=paces,
            iterations=counts,
            seeds=options.seeds,
            trl_seconds=options.trl_seconds,
            loopfast_seconds=options.loopfast_seconds,
            say=_say,
        )
        found = keep({"time_to_reward": {**part, "date": today, "threads": options.threads}})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # this process only waits
    sys.exit(main())
