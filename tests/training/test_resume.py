from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loopfast.training.train as training
from loopfast.config import Config, config_to_yaml
from loopfast.errors import CheckpointError, Interrupted, LoopfastError, WriteError
from loopfast.rollout import Sampler
from loopfast.run.console import Display
from loopfast.run.lock import NAME, locked
from loopfast.run.tracking import Tracker, read_metrics
from loopfast.training import saving
from tests.distributed.ranks import Ranks, shared_ranks
from tests.outcomes import differences, leftovers, outcome
from tests.rounding import no_deviation

MakeConfig = Callable[..., Config]

# Four images, and an evaluation of one.
FEW = (
    "rollout.prompts_per_iteration=2",
    "rollout.steps=2",
    "evaluation.limit_prompts=1",
    "evaluation.preview_images=1",
    "reward=[{name: jpeg_compressibility}]",
)
# Killed and resumed: PPO, whose running statistics have to survive too, and a course of the learning rate.
LONG = (
    *FEW,
    "algorithm.name=ppo",
    "train.iterations=7",
    "train.lr_schedule=cosine",
    "train.warmup_updates=4",
    "evaluation.every=3",
)


def run(config: Config, resume: str | None = None, display: Display | None = None) -> Path:
    return training.train(config, resume=resume, display=display or Display(quiet=True))


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
    return run(make_config(tmp_path_factory.mktemp("unbroken"), *FEW, "algorithm.name=ppo"))


@pytest.fixture
def copied(unbroken: Path, tmp_path: Path) -> Path:
    """That run, where another of the test's own would be."""
    return Path(shutil.copytree(unbroken, tmp_path / "small"))


@pytest.fixture
def ranks() -> Ranks:
    return shared_ranks()


def written(config: Config) -> list[str]:
    """The command line that trains as a configuration says."""
    file = Path(config.run.directory) / f"{config.run.name}.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    return ["train", "--config", str(file)]


def test_kills_at_random_moments_change_nothing(
    tmp_path: Path, make_config: MakeConfig, ranks: Ranks
) -> None:
    began = time.monotonic()
    expected = outcome(run(make_config(tmp_path, "run.name=unbroken", *LONG)))
    longest = (time.monotonic() - began) / 3
    delays = [random.uniform(0.0, longest) for _ in range(3)]
    command = [*written(make_config(tmp_path, "run.name=killed", *LONG)), "--resume", "auto"]
    for delay in delays:
        ranks.start(command, 1)
        ranks.await_shown("loopfast train\n")
        end = time.monotonic() + delay
        # of 7 iterations at most two a time, however much faster the machine has become
        while time.monotonic() < end and ranks.shown(0).count("\niteration ") < 2:
            time.sleep(0.005)
        ranks.kill()
        assert (ranks.wait(), ranks.errors(0)) == ([-signal.SIGKILL], ""), (delays, ranks.shown(0))
    ranks.run(command, 1)
    assert ranks.errors(0) == "", delays
    folder = tmp_path / "killed"
    assert differences(outcome(folder), expected) == [], delays
    assert leftovers(folder) == []


def stopped(config: Config, stops: list[tuple[str, int, str]]) -> Path:
    """A run that a signal stops and that is gone on with, again and again: at which phases, and what that saves."""
    folder = Path(config.run.directory, config.run.name)
    for number, (phase, times, saved) in enumerate(stops):
        sent, code = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][number % 2]
        with pytest.raises(Interrupted) as caught:
            run(config, "auto" if number else None, Signals(sent, phase, times))
        assert caught.value.exit_code == code
        checkpoint = folder / "checkpoints" / saved
        assert str(caught.value) == f"stopped; {checkpoint} is saved, --resume auto goes on from there"
        assert sorted((folder / "checkpoints").iterdir())[-1] == checkpoint
    return run(config, "auto")


def test_signals_save_and_the_run_goes_on(small_config: MakeConfig) -> None:
    options = (
        *FEW,
        "model.tune=lora",
        "algorithm.name=ppo",
        "algorithm.kl_weight=0.1",
        "rollout.guidance_scale=2.0",
        "train.inner_epochs=2",
        "train.iterations=2",
        "evaluation.every=1",
    )
    expected = outcome(run(small_config("run.name=unbroken", *options)))
    stops = [
        ("evaluation", 1, "iteration-000000"),
        ("rollout", 1, "iteration-000000"),
        ("reward", 1, "iteration-000000-update-1"),
        ("replay", 3, "iteration-000000-update-4"),
        ("evaluation", 1, "iteration-000001"),
        ("replay", 1, "iteration-000001-update-1"),
        ("evaluation", 1, "iteration-000002"),
    ]
    # checkpoints that are due could not be told from those that the signals make
    found = outcome(stopped(small_config("run.name=stopped", *options, "checkpoint.every=50"), stops))
    assert differences(found, expected) == []


def test_a_run_that_screens_its_pairs_can_be_stopped_between_updates(small_config: MakeConfig) -> None:
    options = (
        "algorithm.logprob=mean",
        "algorithm.clip_range=1e-5",
        "train.updates_per_iteration=4",
        "train.iterations=2",
        "evaluation.every=0",
        "evaluation.limit_prompts=1",
        "evaluation.preview_images=1",
        "reward=[{name: jpeg_compressibility}]",
    )
    with pytest.MonkeyPatch.context() as patch:
        # half of the updates that may be screened are
        patch.setattr(training, "SCREENING_SHARE", 0.2)
        unbroken = run(small_config("run.name=unbroken", *options))
        lines = read_metrics(unbroken / "metrics.jsonl")[1:]
        screened = [line["screened_out"] for line in lines]
        # after the first update, where screening begins, and after an iteration's end
        stops = [
            ("replay", 1, "iteration-000000-update-1"),
            ("replay", 2, "iteration-000000-update-3"),
            ("replay", 3, "iteration-000001-update-2"),
        ]
        found = outcome(stopped(small_config("run.name=stopped", *options), stops))
        assert differences(found, outcome(unbroken)) == []
    assert min(screened) > 0
    assert screened != [line["zero_gradient"] for line in lines]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_the_command_exits_with_the_signals_code(
    number: int, code: int, tmp_path: Path, make_config: MakeConfig, ranks: Ranks
) -> None:
    ranks.start(written(make_config(tmp_path, *FEW, "train.iterations=1000")), 1)
    ranks.await_shown("iteration    1/1000")
    ranks.kill(number)
    assert ranks.wait() == [code]
    [line] = ranks.errors(0).splitlines()
    assert line.startswith("error: stopped; ")
    assert line.endswith(" is saved, --resume auto goes on from there")
    assert list((tmp_path / "small" / "checkpoints").iterdir())


class Warnings(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def warning(self, text: str) -> None:
        self.lines.append(text)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    copied: Path, unbroken: Path, small_config: MakeConfig
) -> None:
    newest = copied / "checkpoints" / "iteration-000003"
    victim = newest / "optimizer.safetensors"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    display = Warnings()
    folder = run(small_config(*FEW, "algorithm.name=ppo"), "auto", display)
    [warning] = display.lines
    assert str(newest) in warning
    assert "optimizer.safetensors" in warning
    assert warning.endswith("using the one before it")
    assert differences(outcome(folder), outcome(unbroken)) == []


def test_checkpoints_that_are_all_damaged_are_refused(copied: Path, small_config: MakeConfig) -> None:
    config = small_config(*FEW, "algorithm.name=ppo")
    for victim in copied.glob("checkpoints/*/policy.safetensors"):
        victim.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"policy\.safetensors has 0 bytes"):
        run(config, str(copied / "checkpoints" / "iteration-000003"))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be used"):
        run(config, "auto", Warnings())


def test_a_checkpoint_of_another_model_is_refused(copied: Path, small_config: MakeConfig) -> None:
    text = (copied / "config.yaml").read_text("utf-8")
    (copied / "config.yaml").write_text(text.replace("tune: full", "tune: lora"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be resumed: its weights are not those"):
        run(small_config(*FEW, "algorithm.name=ppo", "model.tune=lora"), "auto")


def test_a_folder_that_holds_no_run_is_not_resumed(copied: Path, small_config: MakeConfig) -> None:
    (copied / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"is not a run's folder: there is no config\.yaml in it"):
        run(small_config(*FEW), "auto")


# Files cannot grow beyond a limit from the nth call of a function of the trainer on.
LIMITED = """\
import resource
import loopfast.training.train

original = loopfast.training.train.{method}
calls = 0

def limited(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return original(*args, **kwargs)

loopfast.training.train.{method} = limited
"""


@pytest.mark.parametrize(
    ("method", "call", "limit", "iterations", "said"),
    [
        pytest.param("save", 2, 20_000, 2, "cannot save checkpoint iteration-000002", id="checkpoint"),
        pytest.param("finish_iteration", 3, 1_300, 3, "cannot write the metrics in ", id="metrics"),
        pytest.param("finish_iteration", 3, 200, 2, "cannot write in ", id="evaluation"),
        pytest.param("export", 1, 10_000, 1, "cannot write in ", id="export"),
    ],
)
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    method: str,
    call: int,
    limit: int,
    iterations: int,
    said: str,
    tmp_path: Path,
    make_config: MakeConfig,
    ranks: Ranks,
) -> None:
    config = make_config(tmp_path, *FEW, "evaluation.every=0", f"train.iterations={iterations}")
    ranks.start(written(config), 1, before=LIMITED.format(method=method, call=call, limit=limit))
    assert ranks.wait() == [1], ranks.errors(0)
    [line] = ranks.errors(0).splitlines()
    assert line.startswith(f"error: {said}")
    assert os.strerror(errno.EFBIG) in line  # what a limit says; a full disk says ENOSPC
    names = sorted(path.name for path in (tmp_path / "small" / "checkpoints").iterdir())
    assert names[-1] == "iteration-000001"
    # with room again, the run goes on from there
    folder = run(config, "auto", display := Warnings())
    assert display.lines == []
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [*range(iterations + 1)]
    assert (folder / "report.html").exists()


class Faults(Display):
    """Puts a file in the place of each of some folders when a phase is entered for the nth time, and sends a signal."""

    def __init__(self, phase: str, times: int, *places: Path, number: int | None = None) -> None:
        super().__init__(quiet=True)
        self._awaited, self._left, self._places, self._number = phase, times, places, number

    def phase(self, name: str) -> None:
        super().phase(name)
        self._left -= name == self._awaited
        if name == self._awaited and self._left == 0:
            for place in self._places:
                place.rename(place.with_name(f"{place.name}-before"))
                place.write_text("in the way")
            if self._number is not None:
                os.kill(os.getpid(), self._number)

    def mend(self) -> None:
        for place in self._places:
            place.unlink()
            place.with_name(f"{place.name}-before").rename(place)


def test_metrics_that_cannot_be_written_end_a_run_with_its_state_saved(
    small_config: MakeConfig, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Tracker.record

    def full(self: Tracker, metrics: dict[str, Any]) -> None:
        if metrics["iteration"] == 2:
            # writes to it fail as they do on a disk without space
            self._file = Path("/dev/full").open("w")  # noqa: SIM115 - the tracker closes it
        record(self, metrics)

    config = small_config(*FEW, "algorithm.name=ppo", "checkpoint.every=50")
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "record", full)
        with pytest.raises(WriteError) as caught:
            run(config)
    folder = Path(config.run.directory, "small")
    assert str(caught.value) == (
        f"cannot write the metrics in {folder}: {os.strerror(errno.ENOSPC)}; "
        f"{folder / 'checkpoints' / 'iteration-000002'} is saved, --resume auto goes on from there"
    )
    assert outcome(run(config, "auto")) == outcome(unbroken)


@pytest.mark.parametrize("name", ["images", "evaluation"])
def test_evaluations_that_cannot_be_written_end_a_run_with_its_state_saved(
    name: str, small_config: MakeConfig, unbroken: Path
) -> None:
    config = small_config(*FEW, "algorithm.name=ppo", "checkpoint.every=50")
    folder = Path(config.run.directory, "small")
    faults = Faults("evaluation", 2, folder / name)
    with pytest.raises(WriteError) as caught:
        run(config, display=faults)
    assert str(caught.value).startswith(f"cannot write in {folder}: ")
    saved = folder / "checkpoints" / "iteration-000002"
    assert str(caught.value).endswith(f"; {saved} is saved, --resume auto goes on from there")
    faults.mend()
    assert outcome(run(config, "auto")) == outcome(unbroken)


@pytest.mark.parametrize("name", ["model", "report.html"])
def test_results_that_cannot_be_written_name_what_is_saved(name: str, small_config: MakeConfig) -> None:
    config = small_config(*FEW, "train.iterations=1", "evaluation.every=0")
    folder = Path(config.run.directory, "small")
    obstacle = folder / name / "in the way" if name == "report.html" else folder / name
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    with pytest.raises(LoopfastError) as caught:
        run(config)
    assert str(caught.value).startswith(f"cannot write in {folder}")
    # it was saved before, and is not again
    saved = folder / "checkpoints" / "iteration-000001"
    assert str(caught.value).endswith(f"; {saved} is saved, --resume auto goes on from there")
    obstacle.unlink()
    if name == "report.html":
        obstacle.parent.rmdir()
    assert (run(config, "auto") / "report.html").is_file()


def test_a_stop_that_cannot_save_is_an_error(small_config: MakeConfig) -> None:
    config = small_config(*FEW, "checkpoint.every=1")
    checkpoints = Path(config.run.directory, "small", "checkpoints")
    faults = Faults("replay", 3, checkpoints, number=signal.SIGTERM)
    with pytest.raises(CheckpointError) as caught:
        run(config, display=faults)
    assert str(caught.value).startswith(
        f"cannot save checkpoint iteration-000001-update-1 in {checkpoints}: "
    )
    assert caught.value.exit_code == 1
    faults.mend()
    assert read_metrics(run(config, "auto") / "metrics.jsonl")[-1]["iteration"] == 3


def test_a_second_process_in_the_same_folder_is_refused(
    tmp_path: Path, make_config: MakeConfig, ranks: Ranks
) -> None:
    config = make_config(tmp_path, *FEW)
    folder = tmp_path / "small"
    with locked(folder, print):
        ranks.start(written(config), 1, before="import loopfast.run.lock\nloopfast.run.lock.PATIENCE = 0\n")
        assert ranks.wait() == [1]
        [line] = ranks.errors(0).splitlines()
        assert line.startswith(f"error: {folder} is in use by process {os.getpid()} on host ")
        with pytest.raises(LoopfastError, match="is in use by another run of this process"):
            run(config, "auto")
        assert [path.name for path in folder.iterdir()] == [NAME]


# What a run reads beside its configuration.
REWARD = (
    "def reward(images, prompts, metadata):\n    return [{sign}1.0 * len(prompt) for prompt in prompts]\n"
)


@pytest.fixture
def with_files(small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run whose prompts and reward are files in the current folder."""
    monkeypatch.chdir(tmp_path)
    module = f"reward_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(REWARD.format(sign="+"), "utf-8")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\na green cross\n", "utf-8")
    (tmp_path / "others.txt").write_text("a yellow ring\n", "utf-8")
    sources = (
        "prompts.source=prompts.txt",
        "evaluation.prompts=others.txt",
        f"reward=[{{name: '{module}:reward'}}]",
    )
    return small_config(*FEW, *sources, "train.iterations=2", "evaluation.every=0")


def edit(file: Path) -> str:
    """What the run says of the file, once it is another."""
    if file.suffix == ".py":
        file.write_text(REWARD.format(sign="-"), "utf-8")
        return f"the file of reward '{file.stem}:reward' is another"
    file.write_text("a black square and a white circle\na white triangle\n", "utf-8")
    return {"prompts": "prompts.source", "others": "evaluation.prompts"}[file.stem] + " holds other prompts"


@pytest.mark.parametrize("pattern", ["prompts.txt", "reward_*.py", "others.txt", "nothing"])
def test_images_of_other_prompts_or_rewards_are_sampled_anew(
    pattern: str, with_files: Config, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match="iteration-000000-update-1 is saved"):
        run(with_files, None, Signals(signal.SIGTERM, "replay", 1))
    said = [edit(file) for file in tmp_path.glob(pattern)]
    folder = run(with_files, "auto", display := Warnings())
    anew = pattern not in ("others.txt", "nothing")
    consequence = "iteration 1 is sampled anew" if anew else "the run goes on with the present ones"
    assert display.lines == [
        f"{text} than when iteration-000000-update-1 was saved; {consequence}" for text in said
    ]
    lines = read_metrics(folder / "metrics.jsonl")
    # four images an iteration, all that were sampled
    assert [line["images"] for line in lines] == ([0, 8, 12] if anew else [0, 4, 8])
    assert lines[1]["ratio_max_deviation"] == no_deviation()
    assert lines[1]["learning_rate"] == lines[2]["learning_rate"]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())][-1] == "iteration-000002"


def test_files_that_change_between_iterations_are_said(with_files: Config, tmp_path: Path) -> None:
    first = with_files.model_copy(update={"train": with_files.train.model_copy(update={"iterations": 1})})
    run(first)
    said = [edit(tmp_path / name) for name in ("prompts.txt", "others.txt")]
    folder = run(with_files, "auto", display := Warnings())
    assert display.lines == [
        f"{', '.join(said)} than when iteration-000001 was saved; the run goes on with the present ones"
    ]
    assert [line["images"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 4, 8]


def test_a_checkpoint_that_does_not_say_what_it_belongs_to_is_resumed_as_before(
    with_files: Config, tmp_path: Path
) -> None:
    expected = outcome(
        run(with_files.model_copy(update={"run": with_files.run.model_copy(update={"name": "u"})}))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_data_identity", lambda run: {})
        patch.setattr(saving, "_sampled_identity", lambda run, state: {})
        with pytest.raises(Interrupted):
            run(with_files, None, Signals(signal.SIGTERM, "replay", 1))
    with (tmp_path / "others.txt").open("a", encoding="utf-8") as file:
        file.write("\n\n")
    folder = run(with_files, "auto", display := Warnings())
    assert (display.lines, outcome(folder)) == ([], expected)


def test_a_signal_during_the_last_moments_still_finishes(small_config: MakeConfig) -> None:
    class Last(Display):
        def finish(self, rows: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    config = small_config(*FEW, "train.iterations=1")
    assert (run(config, display=Last(quiet=True)) / "report.html").exists()


def test_sampling_looks_for_signals_between_batches(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("rollout.microbatch=2", "train.microbatch=2", "train.iterations=1")
    calls = []
    stream = Sampler.stream

    def watched(self: Sampler, *args: Any, between: Any = lambda: None, **kwargs: Any) -> Any:
        def counted() -> None:
            calls.append(len(calls))
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            between()

        return stream(self, *args, between=counted, **kwargs)

    monkeypatch.setattr(Sampler, "stream", watched)
    with pytest.raises(LoopfastError, match="stopped"):
        run(config)
    # two batches of the evaluation, and none of the rollout's but the one that was asked about
    assert len(calls) == 3
