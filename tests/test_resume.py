from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import loopfast.train as training
from loopfast.config import Config, config_to_yaml
from loopfast.console import Display
from loopfast.errors import CheckpointError, Interrupted, LoopfastError
from loopfast.rollout import Sampler
from loopfast.tracking import METRICS, read_metrics

MakeConfig = Callable[..., Config]

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

# Of two equal runs these differ.
MEASURED = {
    name for name, metric in METRICS.items() if metric.section in ("time", "speed") or metric.unit == "byte"
}

# Killed and resumed: PPO, whose running statistics have to survive too, and a course of the learning rate.
LONG = (
    "algorithm.name=ppo",
    "train.iterations=16",
    "train.lr_schedule=cosine",
    "train.warmup_updates=4",
    "evaluation.every=4",
    "checkpoint.every=1",
    "reward=[{name: jpeg_compressibility}]",
)


def run(config: Config, resume: str | None = None, display: Display | None = None) -> Path:
    return training.train(config, resume=resume, display=display or Display(quiet=True))


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]], list[Any]]:
    """All that should be the same, bit for bit: weights and optimizer, metrics, evaluations."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    tensors = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    lines = [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    evaluations = [
        json.loads(path.read_text("utf-8"))
        for path in sorted((folder / "evaluation").glob("iteration-*.json"))
    ]
    return {"": last.name.encode(), **tensors}, lines, evaluations


class Signals(Display):
    """Sends this process a signal when a phase is entered for the nth time."""

    def __init__(self, number: int, phase: str, times: int) -> None:
        super().__init__(quiet=True)
        self._number, self._awaited, self._left = number, phase, times

    def phase(self, name: str) -> None:
        super().phase(name)
        self._left -= name == self._awaited
        if name == self._awaited and self._left == 0:
            os.kill(os.getpid(), self._number)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    return run(make_config(tmp_path_factory.mktemp("unbroken"), "algorithm.name=ppo"))


class Launcher:
    """Runs the command line in processes of its own, without importing everything anew for each of them."""

    PROGRAM = """\
import json, os, sys
import loopfast.cli.options, loopfast.train
from loopfast.__main__ import main
from loopfast.config import ModelConfig
from loopfast.policies import load_policy

loopfast.cli.options.quiet_libraries()
load_policy(ModelConfig(pretrained=sys.argv[1]))
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, path in enumerate(order["files"], start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        exec(order["before"])
        code = main(order["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self, folder: Path, pipeline: Path) -> None:
        self._pid: int | None = None
        self._files = [folder / "stdout", folder / "stderr"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, str(pipeline)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, config: Config, *options: str, before: str = "", until: str = "") -> None:
        """Starts ``loopfast train`` in a process where the program ``before`` has run.

        Returns when its output contains the text ``until``.
        """
        assert self._process.stdin is not None
        self.finish()
        for file in self._files:
            file.unlink(missing_ok=True)
        order = {
            "arguments": ["train", "--config", str(written(config)), *options],
            "files": [str(file) for file in self._files],
            "before": before,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._pid = self._answer()
        while until not in self.shown():
            if not Path(f"/proc/{self._pid}").exists():
                raise AssertionError(f"{until!r} was never shown: {self.wait()}")
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Sends the process a signal, if it is still there."""
        assert self._pid is not None
        with suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def wait(self) -> tuple[int, str]:
        """The exit code of the process, and what it wrote to stderr."""
        status = self._answer()
        self._pid = None
        return status, self._files[1].read_text()

    def shown(self) -> str:
        """What the process wrote to stdout so far."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    def finish(self) -> None:
        """Ends what a test that failed has left running."""
        if self._pid is not None:
            self.signal(signal.SIGKILL)
            self.wait()

    def close(self) -> None:
        self.finish()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("launcher"), pipeline_folder)
    yield made
    made.close()


def written(config: Config) -> Path:
    file = Path(config.run.directory) / f"{config.run.name}.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    return file


def test_ten_kills_at_random_moments_change_nothing(
    tmp_path: Path, make_config: MakeConfig, launcher: Launcher
) -> None:
    whole = make_config(tmp_path, "run.name=unbroken", *LONG)
    began = time.monotonic()
    expected = outcome(run(whole))
    # of 16 iterations at most two a time, however much faster the machine has become
    longest = (time.monotonic() - began) / 11
    delays = [random.uniform(0.0, longest) for _ in range(10)]
    config = make_config(tmp_path, "run.name=killed", *LONG)
    for delay in delays:
        launcher.start(config, "--resume", "auto", until="loopfast train\n")
        end = time.monotonic() + delay
        while time.monotonic() < end and launcher.shown().count("\niteration ") < 2:
            time.sleep(0.005)
        launcher.signal(signal.SIGKILL)
        assert launcher.wait() == (-signal.SIGKILL, ""), (delays, launcher.shown())
    launcher.start(config, "--resume", "auto")
    assert launcher.wait() == (0, ""), delays
    folder = tmp_path / "killed"
    assert outcome(folder) == expected, delays
    # nothing unfinished is left lying about
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("number", "code", "phase", "times", "saved"),
    [
        (signal.SIGINT, 130, "evaluation", 1, "iteration-000000"),
        (signal.SIGINT, 130, "rollout", 1, "iteration-000000"),
        (signal.SIGTERM, 143, "rollout", 2, "iteration-000001"),
        (signal.SIGTERM, 143, "reward", 2, "iteration-000001-update-1"),
        (signal.SIGINT, 130, "replay", 3, "iteration-000001-update-1"),
        (signal.SIGTERM, 143, "replay", 4, "iteration-000001-update-2"),
        (signal.SIGINT, 130, "evaluation", 2, "iteration-000002"),
        (signal.SIGTERM, 143, "evaluation", 3, "iteration-000003"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(
    number: int, code: int, phase: str, times: int, saved: str, unbroken: Path, small_config: MakeConfig
) -> None:
    config = small_config("algorithm.name=ppo", "checkpoint.every=50")
    folder = Path(config.run.directory, config.run.name)
    with pytest.raises(Interrupted) as caught:
        run(config, display=Signals(number, phase, times))
    assert caught.value.exit_code == code
    checkpoint = folder / "checkpoints" / saved
    assert str(caught.value) == f"stopped; {checkpoint} is saved, --resume auto goes on from there"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [saved]
    assert run(config, "auto") == folder
    assert outcome(folder) == outcome(unbroken)


def test_a_run_can_be_stopped_again_and_again(small_config: MakeConfig) -> None:
    options = (
        "model.tune=lora",
        "algorithm.kl_weight=0.1",
        "rollout.guidance_scale=2.0",
        "train.inner_epochs=2",
        "train.iterations=2",
    )
    expected = outcome(run(small_config("run.name=unbroken", *options)))
    config = small_config("run.name=stopped", *options)
    resume = None
    for phase in ["evaluation", "rollout", *["replay"] * 4, "rollout", *["replay"] * 4, "evaluation"]:
        with pytest.raises(Interrupted):
            run(config, resume, Signals(signal.SIGINT, phase, 1))
        resume = "auto"
    assert outcome(run(config, resume)) == expected


def test_a_run_that_screens_its_pairs_can_be_stopped_between_any_updates(small_config: MakeConfig) -> None:
    options = (
        "algorithm.logprob=mean",
        "algorithm.clip_range=1e-4",
        "train.updates_per_iteration=4",
        "train.iterations=2",
        "evaluation.every=0",
    )
    with pytest.MonkeyPatch.context() as patch:
        # half of the updates that may be screened are
        patch.setattr(training, "SCREENING_SHARE", 0.3)
        expected = outcome(run(small_config("run.name=unbroken", *options)))
        screened = [line["screened_out"] for line in expected[1][1:]]
        config = small_config("run.name=stopped", *options)
        resume = None
        for phase in ["replay"] * 8:
            with pytest.raises(Interrupted):
                run(config, resume, Signals(signal.SIGINT, phase, 1))
            resume = "auto"
        assert outcome(run(config, resume)) == expected
    assert min(screened) > 0
    assert screened != [line["zero_gradient"] for line in expected[1][1:]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_exits_with_the_signals_code(
    number: int, code: int, tmp_path: Path, make_config: MakeConfig, launcher: Launcher
) -> None:
    launcher.start(make_config(tmp_path, "train.iterations=1000"), until="iteration    1/1000")
    launcher.signal(number)
    status, errors = launcher.wait()
    assert status == code
    [line] = errors.splitlines()
    assert line.startswith("error: stopped; ")
    assert line.endswith(" is saved, --resume auto goes on from there")
    assert list((tmp_path / "small" / "checkpoints").iterdir())


class Warnings(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def warning(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: str, unbroken: Path, small_config: MakeConfig
) -> None:
    run(small_config("algorithm.name=ppo", "train.iterations=2"))
    config = small_config("algorithm.name=ppo")
    newest = Path(config.run.directory, "small", "checkpoints", "iteration-000002")
    victim = newest / "optimizer.safetensors"
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[:-100])
    elif damage == "altered":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        victim.unlink()
    display = Warnings()
    folder = run(config, "auto", display)
    [warning] = display.lines
    assert str(newest) in warning
    assert "optimizer.safetensors" in warning
    assert warning.endswith("using the one before it")
    found, lines, _ = outcome(folder)
    expected, expected_lines, _ = outcome(unbroken)
    assert (found, lines) == (expected, expected_lines)


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(small_config: MakeConfig) -> None:
    config = small_config("train.iterations=1")
    folder = run(config)
    newest = folder / "checkpoints" / "iteration-000001"
    (newest / "policy.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"policy\.safetensors has 0 bytes"):
        run(config, str(newest))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be used"):
        run(config, "auto", Warnings())


def test_a_checkpoint_of_another_model_is_refused(small_config: MakeConfig) -> None:
    config = small_config("train.iterations=1", "model.tune=lora", "model.lora.rank=2")
    folder = run(config)
    text = (folder / "config.yaml").read_text("utf-8")
    (folder / "config.yaml").write_text(text.replace("rank: 2", "rank: 4"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be resumed: its weights are not those"):
        run(small_config("train.iterations=2", "model.tune=lora", "model.lora.rank=4"), "auto")


def test_a_folder_that_holds_no_run_is_not_resumed(small_config: MakeConfig) -> None:
    config = small_config("train.iterations=1")
    folder = run(config)
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"is not a run's folder: there is no config\.yaml in it"):
        run(config, "auto")


# Files cannot grow beyond a limit from the nth call of a method of the trainer on.
LIMITED = """\
import resource
import loopfast.train

original = loopfast.train.Trainer.{method}
calls = 0

def limited(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return original(self, *args, **kwargs)

loopfast.train.Trainer.{method} = limited
"""


@pytest.mark.parametrize(
    ("method", "call", "limit", "said", "kept"),
    [
        pytest.param("save", 3, 100_000, "cannot save checkpoint iteration-000003", 2, id="checkpoint"),
        pytest.param("record", 3, 1_300, "cannot write the metrics in ", 1, id="metrics"),
        pytest.param("record", 4, 200, "cannot write in ", 2, id="evaluation"),
        pytest.param("finish", 1, 10_000, "cannot write in ", 3, id="export"),
    ],
)
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    method: str,
    call: int,
    limit: int,
    said: str,
    kept: int,
    tmp_path: Path,
    make_config: MakeConfig,
    launcher: Launcher,
) -> None:
    config = make_config(tmp_path, "evaluation.every=0")
    launcher.start(config, before=LIMITED.format(method=method, call=call, limit=limit))
    status, errors = launcher.wait()
    assert status == 1, errors
    [line] = errors.splitlines()
    assert line.startswith(f"error: {said}")
    assert os.strerror(errno.EFBIG) in line  # what a limit says; a full disk says ENOSPC
    names = sorted(path.name for path in (tmp_path / "small" / "checkpoints").iterdir())
    assert names[-1] == f"iteration-{kept:06d}"
    # with room again, the run goes on from there
    folder = run(config, "auto", display := Warnings())
    assert display.lines == []
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (folder / "report.html").exists()


def test_a_signal_during_the_last_moments_still_finishes(small_config: MakeConfig) -> None:
    class Last(Display):
        def finish(self, rows: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    config = small_config("train.iterations=1")
    assert (run(config, display=Last(quiet=True)) / "report.html").exists()


def test_sampling_looks_for_signals_between_batches(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("rollout.microbatch=2", "train.microbatch=2", "train.iterations=1")
    calls = []
    predict = Sampler.sample

    def sample(self: Sampler, *args: Any, between: Any = lambda: None, **kwargs: Any) -> Any:
        def counted() -> None:
            calls.append(len(calls))
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            between()

        return predict(self, *args, between=counted, **kwargs)

    monkeypatch.setattr(Sampler, "sample", sample)
    with pytest.raises(LoopfastError, match="stopped"):
        run(config)
    # two batches of the evaluation, and none of the rollout's but the one that was asked about
    assert len(calls) == 3
