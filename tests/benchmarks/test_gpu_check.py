"""The check of a GPU: stages that hang, fail and print, what a kill leaves, and its real stages at their smallest."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import machine, measure, ncu, runner, sanitizer
from benchmarks.gpu_check.record import Record, latest, read_lines
from benchmarks.gpu_check.runner import SKIPPED, Result, Task, run_all
from benchmarks.gpu_check.stages import NAMES, STAGES, Setting
from benchmarks.gpu_check.table import as_text
from tests.rounding import no_deviation

ROOT = Path(__file__).parents[2]

# Runs a child that has left its session, and writes its id; then goes on as told.
LEAVES_A_CHILD = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
"""


def python(text: str, *arguments: str) -> Sequence[str]:
    return (sys.executable, "-S", "-c", text, *arguments)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(tmp_path: Path, *tasks: Task, limit: float = 60) -> list[Result]:
    lines = tmp_path / "results.jsonl"
    return run_all(
        tasks,
        limit,
        lambda stage: Record(lines, "a run", stage),
        tmp_path / "log.txt",
        tmp_path,
        lambda _: None,
    )


def test_no_stage_ends_another(tmp_path: Path) -> None:
    results = run(
        tmp_path,
        Task("fails", 30, python("import sys; print('it broke'); sys.exit(3)")),
        Task("hangs", 1, python("import time; print('waiting', flush=True); time.sleep(600)")),
        Task("is killed", 30, python("import os; os.kill(os.getpid(), 9)")),
        Task("is silent", 30, python("")),
        Task("is loud", 30, python("import sys; sys.stdout.write('x' * 5_000_000 + '\\nthe last line\\n')")),
        Task("cannot start", 30, ["/nowhere/at/all"]),
        Task("lacks", 30, python(""), lacks="there is no card"),
        Task("finds out", 30, python(f"import sys; sys.exit({SKIPPED})")),
        Task("is good", 30, python("print('well')")),
    )
    assert [(result.name, result.outcome) for result in results] == [
        ("fails", "failed"),
        ("hangs", "over its limit"),
        ("is killed", "failed"),
        ("is silent", "ok"),
        ("is loud", "ok"),
        ("cannot start", "failed"),
        ("lacks", "skipped"),
        ("finds out", "skipped"),
        ("is good", "ok"),
    ]
    assert [result.reason for result in results][:3] == ["exit status 3", "ended after 1 s", "signal 9"]
    log = (tmp_path / "log.txt").read_text()
    assert re.findall(r"=== ([a-z ]+):", log) == [r.name for r in results if r.reason != "there is no card"]
    for said in ("it broke", "waiting", "the last line", "well", "cannot start /nowhere/at/all"):
        assert said in log
    assert len(log) < 1_000_000
    lines = read_lines(tmp_path / "results.jsonl")
    assert [(line["stage"], line["outcome"]) for line in lines] == [(r.name, r.outcome) for r in results]


def test_time_is_dealt_out_and_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST_SECONDS", 1.0)
    sleeps = python("import time; time.sleep(600)")
    results = run(tmp_path, Task("first", 60, sleeps), Task("second", 60, sleeps), limit=2)
    assert [result.outcome for result in results] == ["cut short", "no time left"]
    assert results[0].reason == "only 2 s were left of 60"
    assert results[1].reason == "the limit of 2 s is used up"


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found by /proc")
@pytest.mark.parametrize("ends", ["", "import time; time.sleep(600)"], ids=["that ends", "that hangs"])
def test_what_a_stage_leaves_behind_is_ended(tmp_path: Path, ends: str) -> None:
    noted, scratch = tmp_path / "child", tmp_path / "scratch"
    more = "import os, pathlib\npathlib.Path(sys.argv[2]).write_text(os.environ['TMPDIR'])\n"
    task = Task("leaves", 2, python(LEAVES_A_CHILD + more + ends, str(noted), str(scratch)))
    (result,) = run(tmp_path, task)
    assert result.outcome == ("over its limit" if ends else "ok")
    wait_for(lambda: not alive(int(noted.read_text())))
    assert not Path(scratch.read_text()).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found by /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "Ctrl-C"])
def test_a_runner_that_is_ended_takes_its_stages_along(tmp_path: Path, number: int) -> None:
    """After kill -9 the lines are there; after Ctrl-C it says how it ended, too."""
    stage = f"""{LEAVES_A_CHILD}
from benchmarks.gpu_check.record import Record
import os, time
Record.from_environment("x").write("figure", value=1)
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
time.sleep(600)
"""
    # a shell that starts the tests in the background lets them ignore Ctrl-C
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runner import Task, run_all
folder = Path({str(tmp_path)!r})
task = Task("long", 600, (sys.executable, "-S", "-c", {stage!r}, str(folder / "child"), str(folder / "stage")))
record = lambda name: Record(folder / "results.jsonl", "a run", name)
results = run_all([task, task], 600, record, folder / "log.txt", folder, print)
print([result.outcome for result in results])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        python(program), env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((tmp_path / "stage").exists)
    wait_for(lambda: (tmp_path / "stage").read_text())
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    for name in ("child", "stage"):
        pid = int((tmp_path / name).read_text())
        wait_for(lambda pid=pid: not alive(pid))
    lines = read_lines(tmp_path / "results.jsonl")
    assert lines[0] == {"run": "a run", "stage": "long", "what": "figure", "value": 1}
    if number == signal.SIGINT:
        assert output.splitlines()[-1] == "['interrupted']"
        assert [line["outcome"] for line in lines[1:]] == ["interrupted"]


def test_lines_of_several_writers_and_what_is_read_of_a_cut_off_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second = Record(path, "1", "a"), Record(path, "2", "b")
    first.write("x", value=float("nan"), inner={"list": [1.5, float("inf")]})
    second.write("y", text="ü\n")
    with path.open("a") as file:
        file.write('[1]\n\n{"run": "1", "stage": "a", "wh')
    assert read_lines(path) == [
        {"run": "1", "stage": "a", "what": "x", "value": None, "inner": {"list": [1.5, None]}},
        {"run": "2", "stage": "b", "what": "y", "text": "ü\n"},
    ]
    assert read_lines(tmp_path / "none") == []


def test_the_latest_run_of_each_stage_counts(tmp_path: Path) -> None:
    def lines(run: str, device: str, *stages: str, small: bool = False) -> list[dict[str, Any]]:
        start = {"run": run, "stage": "check", "what": "start", "device": device, "small": small}
        return [start, *({"run": run, "stage": stage, "what": run} for stage in stages)]

    card = [*lines("1", "card", "ops", "sd15"), *lines("2", "card", "sd15", "ncu")]
    others = [*lines("3", "other card", "ops"), *lines("4", "card", "ops", small=True)]
    found = latest([*others, *card])
    assert {stage: [line["what"] for line in of] for stage, of in found.items()} == {
        "check": ["start"],
        "ops": ["1"],
        "sd15": ["2"],
        "ncu": ["2"],
    }
    assert found["check"][0]["run"] == "2"
    assert latest([]) == {}


def test_names_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)
    for arguments, said in (
        (["ops", "sd1.5"], "no stage is called sd1.5; there are machine, ops, recording, sd15"),
        (["--limit", "0"], "--limit: found 0, allowed: seconds greater than 0"),
        (["--device", "cpu"], "--device cpu takes --small"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ):
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "_probe", lambda environment: {"torch": "2", "devices": {}})
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert command.main(["--out", str(tmp_path / "file/below"), "machine"]) == 2
    assert "--out: cannot make" in capsys.readouterr().err


def test_the_first_stages_take_two_minutes_and_those_of_worth_eight() -> None:
    assert NAMES[:4] == ("machine", "ops", "recording", "sd15")
    limits = {stage.name: stage.seconds for stage in STAGES}
    assert limits["machine"] + limits["ops"] <= 120
    assert (
        sum(limits[name] for name in ("machine", "ops", "recording", "sd15", "sd35")) <= command.LIMIT_SECONDS
    )


def test_why_a_stage_cannot_run() -> None:
    by_name = {stage.name: stage for stage in STAGES}
    cpu, none = Setting("cpu", True, "a CPU"), Setting("cuda", False, None)
    assert by_name["ncu"].lacks(cpu) == "it needs a GPU"
    assert "no CUDA device was found" in (by_name["ops"].lacks(none) or "")
    assert by_name["machine"].lacks(none) is None
    assert by_name["machine"].command(none)[2:] == ("--device", "cpu", "--small")
    odd = by_name["zero3"]._replace(packages={"no_such_module": "no-such-package"})
    assert odd.lacks(cpu) == "no_such_module cannot be found: pip install no-such-package"
    tool = by_name["machine"]._replace(tool="no-such-program")
    assert tool.lacks(cpu) == "no-such-program is not on the PATH; it comes with the CUDA toolkit"


class Listing:
    """A plugin of pytest that notes what is collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found = [item.nodeid for item in session.items]


def test_the_gpu_stages_of_tests_find_their_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("cuda", False, "a card")
    commands = {stage.name: list(stage.command(setting)) for stage in STAGES}
    ops = commands["ops"]
    files = [word for word in ops if word.startswith("tests/")]
    assert ops[ops.index("-k") + 1] == "gpu or triton"
    monkeypatch.chdir(ROOT)
    listing = Listing()
    pytest.main(["--collect-only", "-qq", *files, "-k", "gpu or triton"], [listing])
    found = listing.found
    assert len(found) > 250
    assert any("triton" in test and "test_loop_loss" in test for test in found)
    # the bits first, and the op that matters least last
    assert found[0].endswith("test_noise_has_the_bits_of_the_native_library")
    assert all("group_norm_silu" in test for test in found[-20:])
    assert sanitizer.SELECTION[1:] == ("-k", "results_are_those or (exactly_one and shape4)")
    checked = [test for test in found if sanitizer.SELECTION[0] in test]
    checked = [
        test
        for test in checked
        if "results_are_those" in test or ("exactly_one" in test and "shape4" in test)
    ]
    assert 4 <= len(checked) <= 10
    for name in ("recording", "families"):
        for path in (word for word in commands[name] if word.startswith("tests/")):
            place = ROOT / path
            texts = [file.read_text() for file in (place.glob("test_*.py") if place.is_dir() else [place])]
            assert any("mark.gpu" in text for text in texts)


def test_the_plugin_writes_each_test(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("""
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not now")
def test_not(): pass
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_unready(broken): pass
""")
    (tmp_path / "test_unreadable.py").write_text("import nowhere_to_be_found\n")
    record = Record(tmp_path / "results.jsonl", "a run", "ops")
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"),
            *("-p", "benchmarks.gpu_check.pytest_lines", "--continue-on-collection-errors"),
            *("--rootdir", str(tmp_path), str(tmp_path)),
        ],
        env=os.environ | record.environment() | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
    )
    lines = read_lines(tmp_path / "results.jsonl")
    found = {line["test"].rpartition("::")[2]: (line["outcome"], line.get("error", "")) for line in lines}
    assert found.pop("test_unreadable.py")[0] == "error"
    assert "nowhere_to_be_found" in next(line["error"] for line in lines if "unreadable" in line["test"])
    assert found == {
        "test_good": ("passed", ""),
        "test_bad": ("failed", "AssertionError: one is not two"),
        "test_not": ("skipped", "not now"),
        "test_unready": ("error", "ValueError: no fixture"),
    }
    assert all(line["seconds"] >= 0 for line in lines if "unreadable" not in line["test"])
    table = as_text({"ops": lines}, {"ops": "the ops"})
    assert "failed test_some.py::test_bad: AssertionError: one is not two" in table


NCU = """==PROF== Connected to process 12 (/usr/bin/python3)
"ID","Process ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","loss_kernel","(16, 1, 1)","GPU Speed Of Light Throughput","Duration","nsecond","8,256"
"0","12","loss_kernel","(16, 1, 1)","GPU Speed Of Light Throughput","DRAM Throughput","%","71.25"
"0","12","loss_kernel","(16, 1, 1)","GPU Speed Of Light Throughput","DRAM Frequency","Hz","2,619,000,000"
"0","12","loss_kernel","(16, 1, 1)","Occupancy","Achieved Occupancy","%","61.5"
"1","12","mean_kernel","(1, 1, 1)","GPU Speed Of Light Throughput","Duration","us","2.5"
==PROF== Disconnected
"""


def test_the_figures_of_ncu() -> None:
    assert list(ncu.figures(NCU)) == [
        {
            "kernel": "loss_kernel",
            "grid": "(16, 1, 1)",
            "duration_us": pytest.approx(8.256),
            "dram_percent": 71.25,
            "occupancy_percent": 61.5,
        },
        {"kernel": "mean_kernel", "grid": "(1, 1, 1)", "duration_us": 2.5},
    ]
    assert list(ncu.figures("==ERROR== no permission\n")) == []
    words = ncu.command(Path("file.csv"), ["--device", "cuda"])
    assert words[words.index("--clock-control") + 1] == "none"
    assert "loss_kernel" in ncu.kernels()


def test_the_check_from_the_command_line(tmp_path: Path) -> None:
    """Two stages that cannot run here, in the order of their worth; others are looked at by themselves."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--small", "ncu", "broken"],
        cwd=ROOT,
        env=os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {
        "results.jsonl",
        "log.txt",
        "table.txt",
        "README.md",
    }
    stages = latest(read_lines(tmp_path / "results.jsonl"))
    assert list(stages) == ["check", "broken", "ncu"]
    assert {"device", "torch", "date"} <= stages["check"][0].keys()
    assert stages["ncu"][-1] | {"run": ""} == {
        "run": "",
        "stage": "ncu",
        "what": "stage",
        "outcome": "skipped",
        "seconds": 0.0,
        "reason": "it needs a GPU",
    }
    assert "skipped: it needs a GPU" in (tmp_path / "table.txt").read_text()


@pytest.mark.parametrize("stage", ["sd15", "sd35"])
def test_a_stage_that_trains(tmp_path: Path, stage: str) -> None:
    """What the workers of a stage do, in this process, which has imported the libraries; one lever of each."""
    record = Record(tmp_path / "results.jsonl", "a run", stage)
    measurements = {name: one for name, one in measure._measurements(stage).items() if one.small}
    chosen = [name for name, one in measurements.items() if one.needed]
    chosen += [name for name, one in measurements.items() if one.config is not None][:1]
    assert len(chosen) == 2
    for name in chosen:
        work = measure.Work(name, "cpu", True, tmp_path, record)
        assert measure._work(measurements[name], work) == 0
        if (config := measurements[name].config) is not None:
            measure._plan(config, work)
    lines = read_lines(tmp_path / "results.jsonl")
    iterations = [line for line in lines if "iteration" in line]
    assert [line["iteration"] for line in iterations] == list(range(1, len(iterations) + 1))
    assert all(line["ratio_max_deviation"] == no_deviation() and line["taken"] > 0 for line in iterations)
    assert sum("planned_bytes" in line for line in lines) == 1
    assert not any("error" in line for line in lines)


@pytest.mark.parametrize("company", [False, True], ids=["in a folder of its own", "among others"])
def test_an_xformers_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, company: bool
) -> None:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers/__init__.py").touch()
    (tmp_path / "xformers/ops.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    if company:
        (tmp_path / "diffusers").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {"PYTHONPATH": path}
    said = command._without_broken_xformers(environment)
    assert said is not None
    assert "libcudart.so.12: cannot open" in said
    assert ("remove it" if company else "is left out") in said
    assert environment["PYTHONPATH"] == (path if company else str(ROOT))
    (tmp_path / "xformers/ops.py").write_text("")
    assert command._without_broken_xformers({"PYTHONPATH": path}) is None


def test_the_machine_and_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "built_for_another_torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    packages = {"torch": "torch", "no_such_module": "no-such-package"}
    monkeypatch.setattr(machine, "PACKAGES", packages)
    monkeypatch.setattr(machine, "OPTIONAL", {"built_for_another_torch": "another"})
    monkeypatch.setattr(machine, "_TOOLS", ("no-such-program", Path(sys.executable).name))
    monkeypatch.setattr(
        machine, "_ceilings", lambda options: [("good", lambda: {"x": 1}), ("bad", lambda: 1 / 0)]
    )
    monkeypatch.setattr(sys, "argv", ["machine", "--device", "cpu", "--small"])
    assert machine.main() == 1
    lines = {line["what"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert lines["lacking"]["packages"] == ["no-such-package (pip install no-such-package)"]
    assert lines["lacking"]["optional"] == ["another: OSError: libcudart.so.12: cannot open"]
    assert lines["lacking"]["programs"] == ["no-such-program"]
    assert lines["good"]["x"] == 1
    assert lines["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert {"cpu", "cores", "memory", "free_disk"} <= lines["machine"].keys()


def test_a_measurement_that_fails_is_a_line_and_the_next_goes_on(tmp_path: Path) -> None:
    (tmp_path / "fake_stage.py").write_text("""
import os, time
from benchmarks.gpu_check.measure import Measurement
def raises(work): raise MemoryError("out of it\\nmore")
def dies(work): os.kill(os.getpid(), 9)
def hangs(work): time.sleep(600)
def good(work): work.record.write(work.name, small=work.small, shared=work.folder.is_dir())
MEASUREMENTS = {"raises": Measurement(raises), "dies": Measurement(dies), "hangs": Measurement(hangs, seconds=0.25),
                "good": Measurement(good), "left out": Measurement(raises, small=False)}
""")
    program = """
import sys
from benchmarks.gpu_check import measure
measure.__package__ = ""
measure._measurements = lambda stage: __import__(stage).MEASUREMENTS
measure._PROGRAM = ("-c", open(sys.argv[1]).read(), sys.argv[1])
sys.exit(measure.main(sys.argv[2:]))
"""
    (tmp_path / "program.py").write_text(program)
    record = Record(tmp_path / "results.jsonl", "a run", "fake")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path)])
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            str(tmp_path / "program.py"),
            "fake_stage",
            "--device",
            "cpu",
            "--small",
        ],
        env=os.environ | record.environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    lines = read_lines(tmp_path / "results.jsonl")
    assert [(line["what"], line.get("error")) for line in lines] == [
        ("raises", "MemoryError: out of it"),
        ("dies", "its process ended with signal 9"),
        ("hangs", "ended after its limit of 1 s"),
        ("good", None),
    ]
    assert lines[-1]["shared"]
    assert lines[-1]["small"]
