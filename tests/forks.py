"""Runs programs in processes that are forked from one that has imported their modules, which takes seconds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SERVER = """\
import gc, json, os, signal, sys
# under nohup the signal is ignored, and forked processes inherit that
signal.signal(signal.SIGHUP, signal.SIG_DFL)
gc.disable()  # imported objects are not garbage
{imports}
# or else each process's garbage collection visits all of this, and copies its memory
gc.freeze()
gc.enable()

def run(order, rank):
    for number, name in enumerate(("stdout", "stderr"), start=1):
        path = os.path.join(order["folder"], f"{{name}}-{{rank}}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(order["environment"])
    # the same number as here; before a fork only one thread may exist, because a fork copies only one
    sys.modules["torch"].set_num_threads(order["threads"])
    if order["size"] > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(order["size"]), LOCAL_RANK=str(rank))
    sys.argv[1:] = order["arguments"]
    try:
        exec(order["program"], {{"__name__": "__main__", "rank": rank}})
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99

for line in sys.stdin:
    order = json.loads(line)
    pids = []
    for rank in range(order["size"]):
        pid = os.fork()
        if pid == 0:
            code = run(order, rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    codes = {{}}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
"""


class Forks:
    """Sets of processes, one set at a time.

    Args:
        imports: program of the process that they are forked from.
    """

    def __init__(self, imports: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forks-"))
        self.pids: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(imports=imports)],
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
        atexit.register(self.close)

    def fork(
        self,
        program: str,
        arguments: Sequence[str] = (),
        size: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts a program in each process; ``rank`` is the process's number."""
        for file in self.folder.iterdir():
            file.unlink()
        order = {
            "program": program,
            "arguments": list(arguments),
            "size": size,
            "folder": str(self.folder),
            "environment": environment or {},
            "threads": int(os.environ["OMP_NUM_THREADS"]),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self.pids = self._answer()

    def wait(self) -> list[int]:
        """Returns the processes' exit codes, or negative numbers of signals."""
        codes: list[int] = self._answer()
        self.pids = []
        return codes

    def shown(self, rank: int) -> str:
        """Returns the output of a process to stdout."""
        return self._written(f"stdout-{rank}")

    def errors(self, rank: int) -> str:
        """Returns the output of a process to stderr."""
        return self._written(f"stderr-{rank}")

    def close(self) -> None:
        """Ends all processes."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self, name: str) -> str:
        file = self.folder / name
        return file.read_text("utf-8") if file.exists() else ""

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks the others has ended"
        return json.loads(line)


@functools.cache
def _with_torch() -> Forks:
    return Forks("import torch")


def run_python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Returns a program's exit code and output, as in a new interpreter that has imported torch and nothing else."""
    forks = _with_torch()
    forks.fork(program, arguments, environment=environment)
    [code] = forks.wait()
    return subprocess.CompletedProcess((program, *arguments), code, forks.shown(0), forks.errors(0))


def printed(program: str, *arguments: str, **environment: str) -> str:
    """Runs a program that must succeed, like `run_python`, and returns its output to stdout."""
    done = run_python(program, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
