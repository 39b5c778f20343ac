"""Runs that are broken, resumed until they end, and compared with an uninterrupted run."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tests.chaos.runs import (
    VARIANTS,
    Command,
    Executable,
    Forked,
    alive,
    children,
    deadline,
    descendants,
    send,
    write_config,
)
from tests.distributed.ranks import COMMAND, FORKED_LAUNCH, free_port
from tests.forks import Forks
from tests.outcomes import differences, leftovers, outcome

# A process that runs for this time hangs; an uninterrupted run takes some seconds.
LONGEST = 300.0
# The processes that a killed run has started end within this time.
ORPHANS = 30.0
# The size of the disk that gets full.
DISK = 512 * 2**20

_ITERATIONS = "iterations of metrics.jsonl"

SERVER = "import loopfast.cli.rewards, loopfast.rewards.serve, uvicorn, starlette.applications"


class LostError(Exception):
    """A break has changed something that it must not change."""


class Shared:
    """Objects that all scenarios use: processes to fork from, and uninterrupted runs, each made once.

    Args:
        folder: for the folders of those runs.

    Attributes:
        forked: forks the processes of runs.
        server: forks a reward server.
        port: the reward server's port.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[object, ...], tuple[dict[str, Any], float]] = {}
        self.forked = Forked()
        self.port = free_port()
        # wait until everything is imported, so that the first run takes no longer than the others
        self.forked.fork("")
        self.forked.wait()

    @cached_property
    def server(self) -> Forks:
        return Forks(SERVER)

    def close(self) -> None:
        """Ends all processes."""
        self.forked.close()
        if "server" in vars(self):
            for pid in self.server.pids:
                send(pid, signal.SIGKILL)
            self.server.close()

    def unbroken(self, size: int, overrides: Sequence[str]) -> tuple[dict[str, Any], float]:
        """Returns the outcome of an uninterrupted run with this number of processes, and its seconds."""
        key = (size, *overrides)
        if key not in self._known:
            name = f"unbroken-{len(self._known)}"
            arguments = write_config(self._folder / f"{name}.yaml", name, self._folder, overrides)
            began = time.monotonic()
            self.forked.begin(["train", *arguments], size)
            codes = self.forked.wait()
            assert codes == [0] * size, self.forked.errors(0)
            self._known[key] = outcome(self._folder / name), time.monotonic() - began
            shutil.rmtree(self._folder / name)
        return self._known[key]


class Scenario:
    """One run and its breaks.

    Args:
        kind: its name in `KINDS`.
        rng: decides what happens, and when.
        folder: for the run; empty.
        shared: the processes that run it, and the run that it is compared with.

    Attributes:
        run: the run's folder.
        seconds: the time of the uninterrupted run.
        breaks: the number of breaks, by kind.
        resumes: the number of restarts after a break.
        story: a line for each of its starts.
    """

    def __init__(self, kind: str, rng: random.Random, folder: Path, shared: Shared) -> None:
        self._play, self.rng, self.folder, self.shared = KINDS[kind], rng, folder, shared
        self.breaks: Counter[str] = Counter()
        self.resumes = 0
        self.story: list[str] = []

    def play(self) -> None:
        """Breaks the run, resumes it to its end, and compares.

        Raises:
            LostError: something is lost; the message says what.
        """
        self._play(self)

    # The steps of scenarios.

    def prepare(self, overrides: Sequence[str] = (), size: int = 1, directory: Path | None = None) -> None:
        """Chooses a variant, unless overrides are given, and makes its uninterrupted run."""
        if not overrides:
            name = self.rng.choice(sorted(VARIANTS))
            self.story.append(f"variant {name}")
            overrides = VARIANTS[name]
        self._size, directory = size, directory or self.folder
        self._expected, self.seconds = self.shared.unbroken(size, overrides)
        self.run = directory / "run"
        self._arguments = write_config(self.folder / "run.yaml", "run", directory, overrides)

    def attempt(
        self,
        disturb: Callable[[Command, float], list[str]],
        allowed: Sequence[int] = (),
        *,
        command: Command | None = None,
        launched: str = "",
        seconds: float | None = None,
    ) -> bool:
        """Starts or continues the run, and disturbs it.

        Args:
            disturb: called with the command and the moment at which to break it, drawn from the time that the rest of
                the run takes; returns the kind of each break, none if the run had ended.
            allowed: exit codes of a broken run, besides 0.
            command: starts the processes; None forks them.
            launched: arguments of ``loopfast launch``, if it starts the processes.
            seconds: the time of an uninterrupted run; None uses the measured time.

        Returns:
            Whether the run reached its end.
        """
        command = command or self.shared.forked
        began, moment = time.monotonic(), self.rng.uniform(0.0, (seconds or self.seconds) * self._left())
        with deadline(command, LONGEST) as problems:
            if launched:
                command.begin(["launch", *launched.split(), *self._arguments[:-2]], before=FORKED_LAUNCH)
            else:
                command.begin(["train", *self._arguments], self._size)
            broken = disturb(command, began + moment)
            codes = command.wait()
        self.resumes += bool(self.breaks)
        self.breaks.update(broken)
        after = time.monotonic() - began
        self.story.append(f"{', '.join(broken) or 'not broken'}: exit codes {codes} after {after:.1f} s")
        errors = [command.errors(rank) for rank in range(self._size if not launched else 1)]
        self.story += [line for text in errors for line in text.splitlines()]
        self._check(problems, errors, codes, [0, *allowed] if broken else [0])
        return codes == [0] * len(codes)

    def _left(self) -> float:
        """Returns the share of the iterations that the newest checkpoint lacks; at least a quarter, because starts take
        time.
        """
        names = [path.name for path in (self.run / "checkpoints").glob("iteration-*")]
        done = max((int(name.split("-")[1]) for name in names), default=0)
        return max(0.25, 1 - done / (len(self._expected[_ITERATIONS]) - 1))

    def _check(
        self, problems: list[str], errors: list[str], codes: Sequence[int], allowed: Sequence[int]
    ) -> None:
        if problems:
            raise LostError(problems[0])
        if any(line.startswith("Traceback") for text in errors for line in text.splitlines()):
            raise LostError("a traceback instead of one line")
        if not set(codes) <= set(allowed):
            raise LostError(f"exit codes {[*codes]}, expected any of {sorted(set(allowed))}")

    def end(self) -> None:
        """Continues the run to its end, and compares it.

        Raises:
            LostError: it does not end well, or its outcome differs.
        """
        self.attempt(lambda command, end: [])
        self.compare()

    def compare(self) -> None:
        """Compares the finished run with the uninterrupted one.

        Raises:
            LostError: they differ.
        """
        found = [f"{name} differs" for name in differences(outcome(self.run), self._expected)]
        found += [f"{name} is left over" for name in leftovers(self.run)]
        if not (self.run / "report.html").is_file():
            found.append("report.html is missing")
        if found:
            raise LostError("; ".join(found))

    # The ways to disturb a process.

    def wait_until(self, end: float, pid: int) -> bool:
        """Waits until a moment; returns whether the process exists then."""
        while alive(pid):
            left = end - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, 0.02))
        return False

    def kill(self, command: Command, end: float) -> list[str]:
        """Kills a process or its process group at a moment; in a third of the cases while a checkpoint is being
        written.
        """
        [pid] = command.pids
        if not self.wait_until(end, pid):
            return []
        kind = "kill -9"
        if self.rng.random() < 1 / 3 and self._await_writing(pid):
            kind = "kill -9 while a checkpoint is written"
            time.sleep(self.rng.uniform(0.0, 0.05))
        if not alive(pid):
            return []
        started = descendants(pid)
        send(pid, signal.SIGKILL, group=self.rng.random() < 0.5)
        last = time.monotonic() + ORPHANS
        while any(map(alive, started)):
            if time.monotonic() > last:
                raise LostError(f"processes {started} that it had started still run")
            time.sleep(0.01)
        return [kind]

    def _await_writing(self, pid: int) -> bool:
        folder = self.run / "checkpoints"
        while alive(pid):
            if folder.is_dir() and any(folder.glob(".*")):
                return True
            time.sleep(0.001)
        return False

    def stop(self, number: signal.Signals, command: Command, end: float) -> list[str]:
        """Asks a process or its process group to stop."""
        [pid] = command.pids
        if not self.wait_until(end, pid):
            return []
        send(pid, number, group=self.rng.random() < 0.5)
        return [number.name]


def _kill(play: Scenario, command: Command | None = None) -> None:
    play.prepare()
    # a new interpreter needs as long for the imports as a small run
    seconds = play.seconds + (0 if command is None else 6.0)
    for _ in range(play.rng.randint(4, 8)):
        if play.attempt(play.kill, [-signal.SIGKILL], command=command, seconds=seconds):
            break
    play.end()


def _executable(play: Scenario) -> None:
    _kill(play, Executable(play.folder))


def _stop(number: signal.Signals, play: Scenario) -> None:
    play.prepare()
    for _ in range(play.rng.randint(2, 4)):
        # before the run begins, a signal has its usual effect
        if play.attempt(partial(play.stop, number), [128 + number, -number]):
            break
    play.end()


def _disk(play: Scenario) -> None:
    with _small_disk(play.folder) as disk:
        play.prepare(directory=disk)
        filler = disk / "filler"

        def fill(command: Command, end: float) -> list[str]:
            [pid] = command.pids
            if not play.wait_until(end, pid):
                return []
            room = play.rng.randrange(2**20)
            if os.path.ismount(disk):
                with filler.open("wb") as file:
                    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                    # the run may have used the space that was free a moment ago
                    while free > room:
                        try:
                            os.posix_fallocate(file.fileno(), file.tell(), free - room)
                            break
                        except OSError:
                            free //= 2
                return ["full disk"]
            if alive(pid):
                # stdout is a file, too
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (room + 2**16, room + 2**16))
            return ["limited files"]

        for _ in range(play.rng.randint(1, 3)):
            done = play.attempt(fill, [1])
            filler.unlink(missing_ok=True)
            if done:
                break
        try:
            play.end()
        except LostError:
            if os.path.ismount(disk):
                shutil.copytree(disk, play.folder / "copy-of-disk", dirs_exist_ok=True)
            raise


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """Returns a folder on a separate small disk, if this user may mount one, or else an ordinary folder."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
    mounted = (
        sys.platform == "linux" and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )
    try:
        yield disk
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _damage(play: Scenario) -> None:
    """Damages the newest checkpoint of a killed run: the run uses the previous one, or reports that none is left."""
    play.prepare()
    for _ in range(play.rng.randint(2, 4)):
        if play.attempt(play.kill, [-signal.SIGKILL]):
            break
        saved = sorted((play.run / "checkpoints").glob("iteration-*"))
        if not saved:
            continue
        play.story.append(_damaged(saved[-1], play.rng))
        play.breaks["damaged checkpoint"] += 1
        if len(saved) == 1:
            _refused(play)
            break
    play.end()


def _refused(play: Scenario) -> None:
    """Damages the only checkpoint: the run does not need the damaged part, or reports that it cannot continue."""
    if not play.attempt(lambda command, end: ["no whole checkpoint"], [1]):
        [line] = [line for line in play.story if "can be used" in line][-1:] or [""]
        if not re.search(r"none of the checkpoints in .* can be used", line):
            raise LostError("the run does not say that its checkpoint is damaged")
        shutil.rmtree(play.run)


def _damaged(folder: Path, rng: random.Random) -> str:
    """Cuts or flips a part of a file of a folder; returns a description."""
    # a file that was cut before may be empty
    file = rng.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    if rng.random() < 0.5:
        file.write_bytes(data[:place])
        return f"{folder.name}/{file.name} cut to {place} of {len(data)} bytes"
    bit = rng.randrange(8)
    data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {place} of {folder.name}/{file.name} flipped"


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + ORPHANS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < end, "the reward server does not start"
            time.sleep(0.05)
        else:
            return


def _server(play: Scenario) -> None:
    """Ends a reward server and starts it again: soon, or only when the run has given up."""
    server, port = play.shared.server, play.shared.port
    options = f"{{url: 'http://127.0.0.1:{port}', retries: 5, backoff: 0.2, timeout: 20, batch_size: 2}}"
    reward = f"reward=[{{name: http, options: {options}}}]"

    def serve() -> None:
        server.fork(COMMAND, ["serve-reward", "jpeg_compressibility", "--port", str(port)])

    def fell() -> None:
        send(server.pids[0], signal.SIGKILL)
        server.wait()

    def die(command: Command, end: float) -> list[str]:
        [pid] = command.pids
        if not play.wait_until(end, pid):
            return []
        fell()
        if play.rng.random() < 0.7:
            time.sleep(play.rng.uniform(0.0, 2.0))
            serve()
            return ["server away for a while"]
        return ["server gone"]

    try:
        serve()
        play.prepare([reward])
        for _ in range(play.rng.randint(2, 4)):
            # a run that finds no server at its start ends; this scenario does not test that
            _wait_for_port(port)
            done = play.attempt(die, [1])
            if not server.pids:
                serve()
            if done:
                break
        _wait_for_port(port)
        play.end()
    finally:
        if server.pids:
            fell()


ZERO = ("distributed.zero_stage=2", "algorithm.samples_per_prompt=3", "train.iterations=4")


def _rank(play: Scenario) -> None:
    """Kills one of two processes: the other ends by itself."""
    play.prepare(ZERO, size=2)

    def kill(command: Command, end: float) -> list[str]:
        victim = play.rng.choice(command.pids)
        if not play.wait_until(end, victim):
            return []
        send(victim, signal.SIGKILL)
        return ["one of two processes killed"]

    for _ in range(play.rng.randint(1, 3)):
        # a process that is killed after the last collective operation is not missed
        if play.attempt(kill, [1, -signal.SIGKILL]):
            break
    play.end()


def _launch(play: Scenario) -> None:
    """Kills one of two launched processes: the launcher starts both again."""
    play.prepare(ZERO, size=2)
    times = play.rng.randint(1, 2)

    def kill(command: Command, end: float) -> list[str]:
        [launcher] = command.pids
        broken = []
        for _ in range(times):
            if not play.wait_until(end, launcher):
                break
            processes = [pid for pid in children(launcher) if not _tracks(pid)]
            if processes:
                send(play.rng.choice(processes), signal.SIGKILL)
                broken.append("one of two launched processes killed")
            end = time.monotonic() + play.rng.uniform(0.0, play.seconds)
        return broken

    play.attempt(kill, launched=f"--nproc 2 --max-restarts {times}")
    play.compare()


def _tracks(pid: int) -> bool:
    """Returns whether a process is Python's own tracker, which frees shared memory that others have left."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


KINDS: dict[str, Callable[[Scenario], None]] = {
    "kill": _kill,
    "executable": _executable,
    "sigterm": partial(_stop, signal.SIGTERM),
    "sighup": partial(_stop, signal.SIGHUP),
    "disk": _disk,
    "damage": _damage,
    "server": _server,
    "rank": _rank,
    "launch": _launch,
}
