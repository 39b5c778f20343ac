"""Breaks small runs in many ways, resumes them, and compares them bit by bit with uninterrupted runs.

``python -m tests.chaos --minutes 60``, or ``make chaos ARGS="--minutes 60"``. On one core 200 kills take about 40
minutes. It ends with exit code 1 if anything was lost.
"""

from __future__ import annotations

import os

# before torch is imported: the bits of a run depend on the number of threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.scenarios import KINDS, LostError, Scenario, Shared

# A round: kill -9 is by far the most frequent kind, and the fastest.
ROUND = (
    *(
        "kill",
        "kill",
        "sigterm",
        "kill",
        "damage",
        "disk",
        "kill",
        "server",
        "kill",
        "sighup",
        "rank",
        "kill",
    ),
    *("damage", "launch", "executable"),
)


@dataclass
class Tally:
    """The counts of breaks, resumes and losses."""

    seed: int
    seconds: float = 0.0
    scenarios: Counter[str] = field(default_factory=Counter)
    breaks: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    losses: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """The number of runs with a process that SIGKILL ended."""
        return sum(count for kind, count in self.breaks.items() if "kill" in kind)

    def add(self, kind: str, played: Scenario) -> None:
        self.scenarios[kind] += 1
        self.breaks += played.breaks
        self.resumes += played.resumes

    def write(self, file: Path) -> None:
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_text(json.dumps({"kills": self.kills, **vars(self)}, indent=1), encoding="utf-8")
        temporary.replace(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs scenarios until the time is up or the number of kills is reached; returns the exit code."""
    options = _parse(arguments)
    for ends in (signal.SIGINT, signal.SIGTERM):
        # a small disk is unmounted at the end
        signal.signal(ends, signal.default_int_handler)
    tally, began = Tally(options.seed), time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.folder))
    print(f"seed {options.seed}, folder {root}", flush=True)
    shared = Shared(root)
    try:
        for number, kind in enumerate(itertools.cycle(options.kinds), start=1):
            tally.seconds = time.monotonic() - began
            if tally.seconds > 60 * options.minutes or tally.kills >= (options.kills or sys.maxsize):
                break
            if number >= options.first:
                _scenario(number, kind, root, shared, tally)
            if options.out is not None:
                tally.write(options.out)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        shared.close()
    _summarize(tally)
    if not tally.losses:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if tally.losses else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="no scenario begins after this time (%(default)s)"
    )
    parser.add_argument("--kills", type=int, help="end after this number of kills, too")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="seed of all random choices (drawn)"
    )
    parser.add_argument("--first", type=int, default=1, help="number of the first scenario (%(default)s)")
    parser.add_argument(
        "--kinds",
        type=_kinds,
        default=ROUND,
        help=f"comma-separated kinds from {','.join(KINDS)} (a mixture of all)",
    )
    parser.add_argument("--out", type=Path, help="file for the result in JSON, written after each scenario")
    parser.add_argument("--folder", type=Path, help="folder of the runs; those that lost something are kept")
    return parser.parse_args(arguments)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := set(kinds) - KINDS.keys():
        raise argparse.ArgumentTypeError(f"found {', '.join(sorted(unknown))}, allowed: {', '.join(KINDS)}")
    return kinds


def _scenario(number: int, kind: str, root: Path, shared: Shared, tally: Tally) -> None:
    folder = root / f"{number:04d}-{kind}"
    folder.mkdir()
    began = time.monotonic()
    scenario = Scenario(kind, random.Random(f"{tally.seed}-{number}"), folder, shared)
    lost = None
    try:
        scenario.play()
    except LostError as error:
        lost = str(error)
    tally.add(kind, scenario)
    did = (
        ", ".join(f"{count} x {name}" for name, count in scenario.breaks.items())
        or "ended before it was broken"
    )
    seconds = time.monotonic() - began
    print(
        f"{number:4d} {kind:10s} {seconds:4.0f} s  {did}: {'LOST' if lost else 'nothing lost'}"
        f"   (kills {tally.kills}, resumes {tally.resumes}, losses {len(tally.losses) + bool(lost)})",
        flush=True,
    )
    if lost is None:
        shutil.rmtree(folder)
        return
    (folder / "story").write_text("\n".join([*scenario.story, lost]) + "\n", encoding="utf-8")
    tally.losses.append({"scenario": number, "kind": kind, "what": lost, "story": scenario.story})
    again = f"--seed {tally.seed} --first {number}"
    print(
        "\n".join(f"       {line}" for line in (*scenario.story, lost, f"kept in {folder}; {again}")),
        flush=True,
    )


def _summarize(tally: Tally) -> None:
    print()
    for name, count in sorted(tally.breaks.items()):
        print(f"{count:6d}  {name}")
    runs = sum(tally.scenarios.values())
    print(
        f"{runs} runs in {tally.seconds / 60:.0f} minutes: {tally.kills} kills, {tally.resumes} resumes, "
        f"{len(tally.losses)} losses"
    )


if __name__ == "__main__":
    sys.exit(main())
