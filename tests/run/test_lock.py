from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loopfast.errors import LoopfastError, WriteError
from loopfast.run import lock
from loopfast.run.lock import NAME, locked

ANOTHER = """\
import os, signal, sys
from pathlib import Path
from loopfast.run import lock
from loopfast.errors import LoopfastError

lock.PATIENCE = float(sys.argv[2])
print("ready", flush=True)
try:
    with lock.locked(Path(sys.argv[1]), print):
        print("has it", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
except LoopfastError as error:
    print(error)
"""


def another(folder: Path, patience: float = 0) -> subprocess.Popen[str]:
    """A process that takes the lock, and dies with it."""
    command = [sys.executable, "-c", ANOTHER, str(folder), str(patience)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def never(text: str) -> None:
    raise AssertionError(text)


def test_the_holder_is_named(tmp_path: Path) -> None:
    in_use = f"{tmp_path} is in use by process {os.getpid()} on host {socket.gethostname()}: wait"
    with locked(tmp_path, never):
        # not read here: a process that closes the file ends its own lock
        assert in_use in another(tmp_path).communicate()[0]
        # a second run of this process is refused, too, and does not end the first one's lock
        same = tmp_path / ".." / tmp_path.name
        with (
            pytest.raises(LoopfastError, match="is in use by another run of this process"),
            locked(same, never),
        ):
            pass
        assert in_use in another(tmp_path).communicate()[0]
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, never):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    holder = another(tmp_path)
    assert holder.communicate()[0] == "ready\nhas it\n"
    assert holder.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / NAME).read_text("utf-8"))["pid"] == holder.pid
    with locked(tmp_path, never):
        assert f"in use by process {os.getpid()} " in another(tmp_path).communicate()[0]


def test_who_comes_while_it_ends_waits(tmp_path: Path) -> None:
    with locked(tmp_path, never):
        waiting = another(tmp_path, patience=300)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
    assert waiting.communicate()[0] == "has it\n"


def test_a_file_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = fcntl.lockf, []

    def late(descriptor: int, command: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            # the holder has ended after we have opened its file
            (tmp_path / NAME).unlink()
        lock(descriptor, command)

    monkeypatch.setattr(fcntl, "lockf", late)
    with locked(tmp_path, never):
        assert len(calls) == 2
        assert "in use by process" in another(tmp_path).communicate()[0]


def test_what_it_made_is_removed_where_nothing_came_into_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    with pytest.raises(ZeroDivisionError), locked(folder, never):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with locked(folder, never):
        (folder / "file").touch()
    assert list(folder.iterdir()) == [folder / "file"]


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", missing)
    lines: list[str] = []
    with locked(tmp_path, lines.append):
        pass
    [line] = lines
    assert line.startswith(f"{tmp_path} is on a file system without locks ({os.strerror(errno.ENOLCK)})")


@pytest.mark.parametrize("name", ["runs", NAME])
def test_a_folder_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    if name == "runs":
        folder.touch()
    else:
        (folder / NAME).mkdir(parents=True)
    with pytest.raises(WriteError, match=f"cannot write in {folder}: "), locked(folder, never):
        pass
    assert not lock._held
