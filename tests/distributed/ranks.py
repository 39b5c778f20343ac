"""Runs the command line in several processes that form a group, forked from one that has imported everything."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PROGRAM = """\
import gc, json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import loopfast.cli.options, loopfast.engines.zero3, loopfast.engines.replicated, loopfast.train
import loopfast.evaluation, loopfast.launch, loopfast.reporting
from loopfast.__main__ import main
from loopfast.config import ModelConfig
from loopfast.engines.library import import_deepspeed
from loopfast.policies import load_policy

loopfast.cli.options.quiet_libraries()
import torch
import_deepspeed(torch.device("cpu"))
# DeepSpeed imports these, and torch's compiler with them, when it starts
import deepspeed.runtime.zero.muon.muon_optimizer, deepspeed.runtime.zero.stage3, torch._inductor.compile_fx
load_policy(ModelConfig(pretrained="embedded", tune="lora"))
# else each process looks through all of this for garbage, and copies its memory to do so
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    pids = []
    for rank in range(order["size"]):
        pid = os.fork()
        if pid == 0:
            for number, name in enumerate(("stdout", "stderr"), start=1):
                path = os.path.join(order["folder"], f"{name}-{rank}")
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(order["environment"])
            if order["size"] > 1:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(order["size"]), LOCAL_RANK=str(rank))
            try:
                exec(order["before"], {"rank": rank})
                code = main(order["arguments"])
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
"""


class Ranks:
    """Groups of processes, one group at a time. `shared_ranks` has those of a session of tests."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.pids: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )

    def start(
        self,
        arguments: Sequence[str],
        size: int,
        *,
        before: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts ``loopfast`` in each process, after the program ``before``, which knows its ``rank``.

        What a test that failed has left running is ended.
        """
        if self.pids:
            self.kill()
            self.wait()
        for file in self.folder.iterdir():
            file.unlink()
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if size > 1 else {}
        self._send(
            {
                "arguments": list(arguments),
                "size": size,
                "before": before,
                "folder": str(self.folder),
                "environment": {**group, **(environment or {})},
            }
        )
        self.pids = self._answer()

    def wait(self) -> list[int]:
        """The processes' exit codes, the signal's number below zero."""
        codes: list[int] = self._answer()
        self.pids = []
        return codes

    def run(self, arguments: Sequence[str], size: int, **options: Any) -> None:
        """Runs to an end that has to be good."""
        self.start(arguments, size, **options)
        codes = self.wait()
        assert codes == [0] * size, "\n".join(self.errors(rank) for rank in range(size))

    def shown(self, rank: int) -> str:
        """What a process has written to stdout."""
        return self._written(f"stdout-{rank}")

    def errors(self, rank: int) -> str:
        """What a process has written to stderr."""
        return self._written(f"stderr-{rank}")

    def _written(self, name: str) -> str:
        file = self.folder / name
        return file.read_text("utf-8") if file.exists() else ""

    def await_shown(self, text: str) -> None:
        """Waits until the first process has written a text to stdout."""
        while text not in self.shown(0):
            assert Path(f"/proc/{self.pids[0]}").exists(), f"{text!r} was never shown: {self.errors(0)}"
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends the processes that are still there a signal."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """Ends all of it."""
        self.kill()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks the others has ended"
        return json.loads(line)


@functools.cache
def shared_ranks() -> Ranks:
    """One for all tests of a session: importing everything takes longer than most of what is run."""
    made = Ranks()
    atexit.register(made.close)
    return made


_lock = threading.Lock()


def run_forked(command: Sequence[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` of ``python -m loopfast``, without importing everything anew; one at a time."""
    assert [*command[:3]] == [sys.executable, "-m", "loopfast"]
    with _lock:
        ranks = shared_ranks()
        ranks.start(command[3:], 1, environment=env)
        [code] = ranks.wait()
        return subprocess.CompletedProcess(command, code, ranks.shown(0), ranks.errors(0))


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
