from __future__ import annotations

import builtins
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from loopfast.errors import LoopfastError, MissingExtraError, WriteError
from loopfast.run.tracking import METRICS, Tracker, describe, read_metrics
from tests.forks import run_python


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def record(directory: Path, iterations: range, resume_at: int | None) -> None:
    tracker = Tracker(directory, [], resume_at=resume_at)
    for iteration in iterations:
        tracker.record({"iteration": iteration, "reward_mean": iteration / 7})
    tracker.close()


def test_each_line_is_on_disk_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", [], resume_at=None)
    tracker.record({"iteration": 0, "eval_reward": 0.25})
    assert lines(tmp_path / "run") == [{"iteration": 0, "eval_reward": 0.25}]
    tracker.record({"iteration": 1, "reward_mean": torch.tensor(0.5), "eval_reward": None, "images": 128})
    assert lines(tmp_path / "run")[1] == {"iteration": 1, "reward_mean": 0.5, "images": 128}
    tracker.close()


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [], resume_at=None)
    tracker.record({"iteration": 1, "kl": float("nan"), "loss": torch.tensor(float("inf"))})
    tracker.close()
    assert lines(tmp_path) == [{"iteration": 1, "kl": None, "loss": None}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_metric_must_be_documented(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [], resume_at=None)
    with pytest.raises(KeyError, match="no metric is called 'accuracy'"):
        tracker.record({"iteration": 1, "accuracy": 1.0})
    with pytest.raises(KeyError, match="iteration"):
        tracker.record({"images": 1})
    tracker.close()
    assert lines(tmp_path) == []


def test_the_schema_describes_every_metric() -> None:
    for name, metric in METRICS.items():
        assert metric.description, name
        assert metric.unit, name
    assert describe("reward_mean") is METRICS["reward_mean"]
    assert describe("reward_my_module:score").section == "reward"
    assert describe("eval_embedded_exact").section == "evaluation"
    for name in ("reward_", "eval_", "mean"):
        with pytest.raises(KeyError):
            describe(name)


def test_resuming_cuts_what_comes_after(tmp_path: Path) -> None:
    record(tmp_path, range(6), None)
    record(tmp_path, range(4, 8), 3)
    assert lines(tmp_path) == [{"iteration": i, "reward_mean": i / 7} for i in range(8)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_begins_a_new_record(tmp_path: Path) -> None:
    record(tmp_path, range(6), None)
    record(tmp_path, range(1), None)
    assert [line["iteration"] for line in lines(tmp_path)] == [0]


def test_a_half_written_last_line_is_repaired(tmp_path: Path) -> None:
    record(tmp_path, range(4), None)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [line["iteration"] for line in read_metrics(path)] == [0, 1, 2]
    record(tmp_path, range(3, 5), 3)
    assert lines(tmp_path) == [{"iteration": i, "reward_mean": i / 7} for i in range(5)]


def test_resuming_without_a_record_begins_one(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    record(tmp_path, range(5, 6), 4)
    assert [line["iteration"] for line in lines(tmp_path)] == [5]


@pytest.mark.parametrize(
    ("line", "fault"),
    [("{", "line 2 is not JSON"), ('{"images": 3}', "line 2 is not an object with an iteration")],
)
def test_damage_before_the_last_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n' + line + '\n\n{"iteration": 2}\n')
    with pytest.raises(LoopfastError, match=fault) as caught:
        read_metrics(path)
    assert str(path) in str(caught.value)


def test_a_full_disk_is_one_clear_line() -> None:
    # Writes to /dev/full fail as they do on a disk without space.
    tracker = Tracker.__new__(Tracker)
    tracker._path = Path("/dev/full")
    tracker._file = tracker._path.open("w")
    tracker._sinks = {}
    with pytest.raises(WriteError, match="cannot write the metrics in /dev: No space left on device"):
        tracker.record({"iteration": 1})
    with pytest.raises(LoopfastError, match="No space left on device"):
        tracker.close()


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tracker is called 'mlflow'; there are tensorboard, wandb"):
        Tracker(tmp_path, ["mlflow"], resume_at=None)


def test_tensorboard_gets_scalars_and_images_and_forgets_the_future(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def go(iterations: range, resume_at: int | None) -> None:
        tracker = Tracker(tmp_path, ["tensorboard"], resume_at=resume_at)
        for iteration in iterations:
            tracker.record({"iteration": iteration, "reward_mean": float(iteration), "kl": float("nan")})
            tracker.image("preview", iteration, Image.new("RGBA", (4, 2), "red"))
        tracker.close()

    go(range(1, 6), None)
    go(range(3, 5), 2)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/reward_mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/reward_mean")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
    ]
    assert (events.Images("preview")[0].width, events.Images("preview")[0].height) == (4, 2)


class FakeWandB:
    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.id = "abc"

    def init(self, **options: Any) -> FakeWandB:
        self.inits.append(options)
        return self

    def define_metric(self, *_: str, step_metric: str) -> None:
        assert step_metric == "iteration"

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1

    def Image(self, image: Image.Image) -> tuple[int, int]:  # noqa: N802  (wandb's name)
        return image.size


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    for resume_at in (None, 1):
        tracker = Tracker(tmp_path, ["wandb"], resume_at=resume_at)
        tracker.record({"iteration": 1 + (resume_at or 0), "kl": 0.5})
        tracker.image("preview", 1, Image.new("RGB", (4, 2)))
        tracker.close()
    assert [options["id"] for options in fake.inits] == [None, "abc"]
    assert fake.inits[1]["resume"] == "allow"
    assert fake.inits[0]["name"] == tmp_path.name
    assert fake.logged[0] == {"iteration": 1, "policy/kl": 0.5}
    assert fake.logged[1] == {"iteration": 1, "preview": (4, 2)}
    assert fake.finished == 2


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "train"), ("wandb", "wandb")])
def test_a_missing_package_says_which_extra_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    original = builtins.__import__

    def missing(module: str, *arguments: Any) -> Any:
        if module in ("torch.utils.tensorboard", "wandb"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return original(module, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError) as caught:
        Tracker(tmp_path, [name], resume_at=None)
    assert f"the tracker '{name}'" in str(caught.value)
    assert f"loopfast[{extra}]" in str(caught.value)


@pytest.mark.parametrize("moment", ["log", "Image", "finish"])
def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    warnings: list[str] = []
    tracker = Tracker(tmp_path, ["wandb"], resume_at=None, warn=warnings.append)

    def broken(*_: object) -> None:
        raise ConnectionError("the socket is closed\nas it happens")

    monkeypatch.setattr(fake, moment, broken)
    for iteration in (1, 2):
        tracker.record({"iteration": iteration})
        tracker.image("preview", iteration, Image.new("RGB", (4, 2)))
    tracker.close()
    assert warnings == [
        "the tracker 'wandb' has failed: ConnectionError: the socket is closed; the run goes on without it"
    ]
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2]


def test_a_tracker_that_cannot_start_stops_a_new_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]

    def offline(**_: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(fake, "init", offline)
    with pytest.raises(
        LoopfastError, match="'wandb' cannot start: RuntimeError: no API key; without it in run"
    ):
        Tracker(tmp_path, ["wandb"], resume_at=None)
    warnings: list[str] = []
    Tracker(tmp_path, ["wandb"], resume_at=0, warn=warnings.append).close()
    assert warnings == [
        "the tracker 'wandb' cannot start: RuntimeError: no API key; the run goes on without it"
    ]


FULL = """\
import resource, sys
from pathlib import Path
from loopfast.run.tracking import Tracker

tracker = Tracker(Path(sys.argv[1]), ["tensorboard"], resume_at=None, warn=print)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
for iteration in range(40):
    tracker.record({"iteration": iteration, "kl": 0.5, "loss": 1.0, "grad_norm": 2.0})
tracker.close()
"""


def test_a_full_disk_under_tensorboard_is_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = run_python(FULL, str(tmp_path))
    # the thread that writes its file prints nothing
    assert (done.returncode, done.stderr) == (0, "")
    problem = os.strerror(errno.EFBIG)
    assert done.stdout == f"the tracker 'tensorboard' has failed: {problem}; the run goes on without it\n"
    assert [line["iteration"] for line in lines(tmp_path)] == [*range(40)]


def test_metrics_that_cannot_be_written_are_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    for resume_at in (None, 1):
        with pytest.raises(WriteError, match=f"cannot write the metrics in {tmp_path}: "):
            Tracker(tmp_path, [], resume_at=resume_at)
