"""Output that cannot be written ends nothing, and is readable in any encoding."""

from __future__ import annotations

import ast
import codecs
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loopfast.system import streams
from loopfast.system.streams import REPLACE, open_streams
from tests.forks import run_python

OPEN = "import os, sys\nfrom loopfast.system.streams import lost_output, open_streams\n"


def run(program: str, *, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A program in an interpreter of its own, under a shell that redirects its streams."""
    command = f'exec "$0" -c "$1" {redirect}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, OPEN + program],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", b'0.5 +/- 0.1 -> sigma^2 x 3... "q" - \\xe9 \\U0001f600 \\udcff'),
        ("latin-1", b'0.5 \xb1 0.1 -> sigma\xb2 \xd7 3... "q" - \xe9 \\U0001f600 \\udcff'),
        ("cp1252", b"0.5 \xb1 0.1 -> sigma\xb2 \xd7 3\x85 \x93q\x94 \x96 \xe9 \\U0001f600 \\udcff"),
        ("utf-8", "0.5 ± 0.1 → σ² × 3… “q” – é 😀 \\udcff".encode()),
    ],
)
def test_what_an_encoding_lacks_is_written_in_ascii(encoding: str, written: bytes) -> None:
    text = "0.5 ± 0.1 → σ² × 3… “q” – é 😀 \udcff"
    assert text.encode(encoding, REPLACE) == written


def test_both_streams_take_any_character() -> None:
    program = "open_streams()\nfor stream in (sys.stdout, sys.stderr): print('± 😀 \\udcff', file=stream)\n"
    done = run(program, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"+/- \\U0001f600 \\udcff\n")
    assert done.stderr == done.stdout


def test_the_error_handler_is_for_writing() -> None:
    with pytest.raises(UnicodeDecodeError):
        codecs.decode(b"\xff", "utf-8", REPLACE)


PRINTS = "print('line\\n' * 100_000)\nprint('end', flush=True)\nsys.exit(3)\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_failure(unbuffered: str) -> None:
    program = f"open_streams(keep_going=True)\n{PRINTS}"
    done = run(program, redirect="2>&1 | head -1", PYTHONUNBUFFERED=unbuffered)
    assert done.stdout == b"line\n"
    # what was lost is nobody's, and nothing is said at the interpreter's end
    program = "open_streams()\nprint('x' * 10**6)\nsys.stderr.write(str(lost_output()))\n"
    done = run(program, redirect="| head -c 1", PYTHONUNBUFFERED=unbuffered)
    assert (done.stdout, done.stderr) == (b"x", b"None")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_device_is_said_once(unbuffered: str) -> None:
    done = run(
        f"open_streams(keep_going=True)\n{PRINTS}", redirect="> /dev/full", PYTHONUNBUFFERED=unbuffered
    )
    assert done.returncode == 3
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("warning: cannot write to stdout: No space left on device; ")
    program = "open_streams()\nprint('x')\nsys.stderr.write(lost_output())\n"
    assert run(program, redirect="> /dev/full").stderr == b"No space left on device"
    assert run(f"open_streams()\n{PRINTS}", redirect="> /dev/full 2>&1").returncode == 3


def test_a_closed_stream_takes_no_other_file(tmp_path: Path) -> None:
    program = f"""
open_streams()
with open({str(tmp_path / "checkpoint")!r}, "w") as file:
    for number in (0, 1, 2):
        os.fstat(number)
        if number: os.write(number, b"printed by a library")
    print("printed"); print("printed", file=sys.stderr)
    file.write("weights")
sys.exit(3)
"""
    done = run(program, redirect="<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")
    assert (tmp_path / "checkpoint").read_text() == "weights"


def test_without_a_buffer_every_character_is_written_at_once() -> None:
    program = "open_streams()\nprint('begun', end='')\nos._exit(3)\n"
    assert run(program, PYTHONUNBUFFERED="1").stdout == b"begun"
    assert run(program, PYTHONUNBUFFERED="").stdout == b""


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    program = "open_streams()\nos.set_blocking(1, False)\nprint('x' * 10**6, end='')\n"
    assert len(run(program).stdout) == 10**6


def test_streams_that_are_not_the_processs_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Notebook:
        def write(self, text: str) -> int:
            return len(text)

    output: Any = Notebook()
    errors = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    open_streams()
    assert sys.stdout is output
    assert sys.stderr is errors
    print("±", file=sys.stderr, flush=True)
    assert errors.buffer.getvalue() == b"+/-\n"  # type: ignore[attr-defined]


DISPLAY = """
import os, sys
from rich.console import Console
from loopfast.system.streams import open_streams
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
open_streams(keep_going=True)
from loopfast.run.console import Display
for terminal in (False, True):
    with Display(console=Console(force_terminal=terminal)) as display:
        display.header("loopfast train", [("σ", "±")])
        display.start(2)
        display.advance({"iteration": 1, "reward_mean": 0.5, "reward_std": 0.1})
        print("a reward prints", flush=True)
        display.warning("→")
        display.finish([("σ", "±")])
"""


def test_a_display_outlives_its_reader() -> None:
    done = run_python(DISPLAY)
    assert (done.returncode, done.stderr) == (0, "warning: →\nwarning: →\n")


COMMAND = """
import os, sys
from loopfast.__main__ import main
kind, *arguments = sys.argv[1:]
if kind == "closed":
    reader, writer = os.pipe()
    os.close(reader)
else:
    writer = os.open("/dev/full", os.O_WRONLY)
os.dup2(writer, 1)
sys.exit(main(arguments))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
@pytest.mark.parametrize("arguments", [["config", "show", "tiny"], ["rewards"], ["--help"]])
def test_a_command_whose_output_is_lost_says_so(arguments: list[str]) -> None:
    done = run_python(COMMAND, "full", *arguments)
    assert (done.returncode, done.stderr) == (1, "error: cannot write to stdout: No space left on device\n")
    done = run_python(COMMAND, "closed", *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def text_without_encoding(path: Path) -> list[str]:
    """The calls in a module that read or write text in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        constants = [part.value for part in node.args if isinstance(part, ast.Constant)]
        if name == "read_text" and not node.args and "encoding" not in given:
            found.append(f"{path.name}:{node.lineno}")
        if name == "write_text" and len(node.args) < 2 and "encoding" not in given:
            found.append(f"{path.name}:{node.lineno}")
        modes = [mode for mode in constants if isinstance(mode, str) and set(mode) <= set("rwxabt+")]
        if name == "open" and modes and "b" not in modes[0] and "encoding" not in given:
            found.append(f"{path.name}:{node.lineno}")
    return found


def test_files_are_utf8_in_every_locale(tmp_path: Path) -> None:
    package = Path(streams.__file__).parent
    assert [call for path in sorted(package.rglob("*.py")) for call in text_without_encoding(path)] == []
    wrong = tmp_path / "wrong.py"
    wrong.write_text('p.read_text()\np.write_text("é")\nopen(p, "w")\np.open("r")\nopen(p, "wb")\n', "utf-8")
    assert text_without_encoding(wrong) == [f"wrong.py:{line}" for line in (1, 2, 3, 4)]
