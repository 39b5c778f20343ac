"""Small runs of the embedded model, and the processes that train them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from loopfast.config import config_to_yaml, parse_config
from tests.distributed.ranks import Ranks

SMALL = """\
run: {trackers: []}
model: {pretrained: embedded, device: cpu, tune: full}
prompts: {source: "embedded:color"}
reward: [{name: jpeg_compressibility}]
algorithm: {samples_per_prompt: 2}
rollout: {prompts_per_iteration: 2, steps: 2}
train: {iterations: 5, updates_per_iteration: 2, steps: all, learning_rate: 1e-4, warmup_updates: 0}
evaluation: {every: 2, images_per_prompt: 1, limit_prompts: 2, preview_images: 1}
checkpoint: {every: 1, keep: 3}
distributed: {timeout: 60}
"""

# Variants with different state to lose: passes over the same images, EMA weights, statistics of prompts, a reference
# model, a learning rate schedule, screened pairs, iterations without a checkpoint, a reward in a separate process.
VARIANTS: dict[str, tuple[str, ...]] = {
    "average": ("train.inner_epochs=2", "train.ema_decay=0.9", "train.iterations=4"),
    "adapter": (
        "model.tune=lora",
        "algorithm.name=ppo",
        "algorithm.kl_weight=0.1",
        "rollout.guidance_scale=2.0",
        "train.lr_schedule=cosine",
        "train.warmup_updates=4",
    ),
    "screened": (
        "algorithm.logprob=mean",
        "algorithm.clip_range=1e-5",
        "algorithm.samples_per_prompt=4",
        "rollout.prompts_per_iteration=1",
        "train.updates_per_iteration=4",
        "train.screening=on",
        "checkpoint.every=2",
    ),
    "process": (
        "rollout.reward_worker=process",
        "algorithm.name=grpo",
        "algorithm.samples_per_prompt=3",
        "train.iterations=4",
    ),
}

# Each process has its own process group, so that the processes that it has started can be killed with it.
OWN_GROUP = "import os; os.setpgid(0, 0)\n"


def write_config(file: Path, name: str, directory: Path, overrides: Sequence[str]) -> list[str]:
    """Writes a run's configuration, and returns the arguments that train or continue it."""
    given = (f"run.name={name}", f"run.directory={directory}")
    config = parse_config(SMALL, (*given, *overrides))
    file.write_text(config_to_yaml(config), encoding="utf-8")
    return ["--config", str(file), "--resume", "auto"]


class Command(Protocol):
    """The command line, in one or more processes."""

    @property
    def pids(self) -> list[int]:
        """The processes, each of them the leader of its process group; none after `wait`."""

    def begin(self, arguments: Sequence[str], size: int = 1, before: str = "") -> None:
        """Starts ``loopfast`` with arguments in several processes, after the program ``before``."""

    def wait(self) -> list[int]:
        """Waits for the end of all processes; returns their exit codes, or the negative numbers of signals."""

    def shown(self, rank: int) -> str:
        """Returns the output of a process to stdout."""

    def errors(self, rank: int) -> str:
        """Returns the output of a process to stderr."""


class Forked(Ranks):
    """Processes that are forked from one that has imported everything."""

    def begin(self, arguments: Sequence[str], size: int = 1, before: str = "") -> None:
        self.start(arguments, size, before=OWN_GROUP + before)
        for pid in self.pids:
            # a process that has ended already has no process group
            with suppress(ProcessLookupError):
                while os.getpgid(pid) != pid:
                    time.sleep(0.001)


class Executable:
    """The installed script ``loopfast``, started in a new process each time.

    Args:
        folder: for its output to stdout and stderr.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [folder / "executable-stdout", folder / "executable-stderr"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pids(self) -> list[int]:
        return [self._process.pid] if self._process is not None else []

    def begin(self, arguments: Sequence[str], size: int = 1, before: str = "") -> None:
        assert (size, before) == (1, "")
        script = Path(sys.executable).with_name("loopfast")
        out, err = (file.open("wb") for file in self._files)
        with out, err:
            self._process = subprocess.Popen(
                [str(script), *arguments], stdout=out, stderr=err, start_new_session=True
            )

    def wait(self) -> list[int]:
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        return [code]

    def shown(self, rank: int) -> str:
        return self._files[0].read_text("utf-8")

    def errors(self, rank: int) -> str:
        return self._files[1].read_text("utf-8")


def alive(pid: int) -> bool:
    """Returns whether a process exists and has not ended, even if its exit code has not been read yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started and that have not ended."""
    with suppress(OSError):
        lists = [file.read_text("utf-8") for file in Path(f"/proc/{pid}/task").glob("*/children")]
        return [child for line in lists for child in map(int, line.split()) if alive(child)]
    return []


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process has started, and those that these have started."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def send(pid: int, number: int, *, group: bool = False) -> None:
    """Sends a process, or its whole process group, a signal, unless it has ended."""
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, number)


@contextmanager
def deadline(command: Command, seconds: float) -> Iterator[list[str]]:
    """Context after whose seconds the processes are killed; the list that it yields is then not empty."""
    problems: list[str] = []

    def end() -> None:
        problems.append(f"had not ended after {seconds:.0f} s")
        for pid in command.pids:
            send(pid, signal.SIGKILL, group=True)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield problems
    finally:
        timer.cancel()
