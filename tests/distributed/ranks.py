"""Runs the command line in several connected processes, forked from one that has imported everything."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.forks import Forks

IMPORTS = """\
os.environ["DS_ACCELERATOR"] = "cpu"
import loopfast.cli.options, loopfast.engines.zero, loopfast.engines.data_parallel, loopfast.training.train
import loopfast.api, loopfast.evaluation, loopfast.system.libraries, loopfast.distributed.launch, loopfast.reporting
from loopfast.config import ModelConfig
from loopfast.engines.deepspeed import import_deepspeed
from loopfast.policies import load_policy

loopfast.system.libraries.quiet_libraries()
import torch
import_deepspeed(torch.device("cpu"))
# DeepSpeed imports these, and torch's compiler with them, when it starts
import deepspeed.runtime.zero.muon.muon_optimizer, deepspeed.runtime.zero.stage3, torch._inductor.compile_fx
load_policy(ModelConfig(pretrained="embedded", tune="lora"))
"""

COMMAND = """
import sys
from loopfast.__main__ import main
sys.exit(main(sys.argv[1:]))
"""

# Before COMMAND: the processes of ``loopfast launch`` are forked from it instead of importing everything again.
FORKED_LAUNCH = """\
import sys
from dataclasses import replace
import loopfast.distributed.launch as launching
from loopfast.__main__ import main

elastic = launching.elastic_launch

def forked(config, command):
    def process(*arguments):
        assert (command, *arguments[:2]) == (sys.executable, "-m", "loopfast")
        sys.exit(main(arguments[2:]))
    return elastic(replace(config, start_method="fork"), process)

launching.elastic_launch = forked
"""


class Ranks(Forks):
    """Sets of processes that run the command line. `shared_ranks` has those of a test session."""

    def __init__(self) -> None:
        super().__init__(IMPORTS)

    def start(
        self,
        arguments: Sequence[str],
        size: int,
        *,
        before: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts ``loopfast`` in each process, after the program ``before``, which knows its ``rank``.

        Processes that a failed test has left running are ended.
        """
        if self.pids:
            self.kill()
            self.wait()
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if size > 1 else {}
        self.fork(before + COMMAND, arguments, size, {**group, **(environment or {})})

    def run(self, arguments: Sequence[str], size: int, **options: Any) -> None:
        """Runs to the end, which must be successful."""
        self.start(arguments, size, **options)
        codes = self.wait()
        assert codes == [0] * size, "\n".join(self.errors(rank) for rank in range(size))

    def await_shown(self, text: str) -> None:
        """Waits until the first process has written a text to stdout."""
        while text not in self.shown(0):
            assert Path(f"/proc/{self.pids[0]}").exists(), f"{text!r} was never shown: {self.errors(0)}"
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the processes that still exist."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """Ends all processes."""
        self.kill()
        super().close()


@functools.cache
def shared_ranks() -> Ranks:
    """Returns one `Ranks` for all tests of a session: importing everything takes longer than most tests."""
    return Ranks()


_lock = threading.Lock()


def run_forked(command: Sequence[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m loopfast`` like ``subprocess.run``, without importing everything again; one call at a time."""
    assert [*command[:3]] == [sys.executable, "-m", "loopfast"]
    with _lock:
        ranks = shared_ranks()
        ranks.start(command[3:], 1, environment=env)
        [code] = ranks.wait()
        return subprocess.CompletedProcess(command, code, ranks.shown(0), ranks.errors(0))


def free_port() -> int:
    """Returns a port that no program uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
