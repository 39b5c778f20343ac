from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.errors import ConfigError, LoopfastError
from loopfast.rollout import Sampler, StochasticSteps
from loopfast.run.lock import NAME, locked
from loopfast.run.tracking import read_metrics
from loopfast.system.interrupts import StopRequest
from loopfast.training import setup
from loopfast.training.saving import save
from loopfast.training.scoring import Scoring
from loopfast.training.setup import _policy, _trained_per_trajectory, start
from loopfast.training.train import finish_iteration, iterate
from tests.training.toys import PROMPTS, Heard, Toy, schedule, toy_config, toy_model, toy_run


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_run_has_all_its_parts(tmp_path: Path) -> None:
    overrides = (
        "rollout.microbatch=4",
        "train.steps=0:2",
        "train.step_fraction=0.5",
        "train.updates_per_iteration=2",
    )
    with toy_run(tmp_path, *overrides) as toy:
        run = toy.run
        assert run.world is SINGLE_PROCESS
        assert run.display is toy.heard
        assert run.folder.path == tmp_path / "toy"
        assert (run.folder.path / "config.yaml").is_file()
        assert [prompt.text for prompt in run.prompts] == [*PROMPTS]
        assert run.evaluation_prompts == run.prompts
        assert list(run.reward_identity) == ["the file of reward 'tests.training.toys:first_pixel'"]
        assert (run.steps.trained_steps, run.trained_per_trajectory) == ((0, 1), 1)
        assert (run.microbatches.rollout, run.microbatches.train) == (4, 4)
        assert (run.sampler.policy, run.sampler.microbatch, run.sampler.rollout_copy) == (toy.policy, 4, None)
        assert run.tracker is not None
        assert (toy.state.iteration, toy.state.images, toy.state.rollout) == (0, 0, None)
        assert toy.heard.warnings == []


def test_a_halving_frees_what_calls_keep(tmp_path: Path) -> None:
    with toy_run(tmp_path) as toy:
        toy.sampled()
        assert len(toy.run.sampler.steps) == 1
        toy.run.microbatches.halve("train", "as a test says")
        assert len(toy.run.sampler.steps) == 0


def test_what_is_sampled_otherwise_than_a_scheduler_says_is_told(tmp_path: Path) -> None:
    heard = Heard()
    with toy_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "scheduler_notes", lambda model: ("one thing", "another"))
        with start(toy_config(tmp_path), None, heard):
            assert heard.warnings == ["one thing", "another"]


def test_auto_begins_a_run_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    with toy_run(tmp_path, resume="auto") as toy:
        assert (toy.state.iteration, toy.state.images, recorded(toy)) == (0, 0, [])


def test_what_is_ended_is_ended_from_the_inside_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, ended = handlers(), list[Any]()

    def noted(kind: type[Any], name: str) -> None:
        original = getattr(kind, name)

        def note(self: Any) -> None:
            ended.append((kind, (tmp_path / "toy" / NAME).exists(), handlers() == before))
            original(self)

        monkeypatch.setattr(kind, name, note)

    noted(Sampler, "release")
    noted(Scoring, "close")
    with toy_run(tmp_path, "rollout.reward_worker=thread") as toy:
        assert all(isinstance(handler.__self__, StopRequest) for handler in handlers())
        toy.sampled()
        assert [thread.name for thread in threading.enumerate()].count("loopfast-reward") == 1
        assert len(toy.run.sampler.steps) == 1
        with pytest.raises(LoopfastError, match="is in use by another run"), locked(tmp_path / "toy", print):
            pass
    # while the folder is still this run's, and signals are still only noted
    assert ended == [(Sampler, True, False), (Scoring, True, False)]
    assert len(toy.run.sampler.steps) == 0
    assert "loopfast-reward" not in [thread.name for thread in threading.enumerate()]
    assert not (tmp_path / "toy" / NAME).exists()
    assert handlers() == before


# In the order in which they are made; the last fails when all are there.
PARTS = (
    "load_prompts",
    "Scoring",
    "load_schedule",
    "scheduler_notes",
    "stochastic_steps",
    "_trained_per_trajectory",
    "reward_identity",
    "_opened",
    "load_policy",
    "Microbatches",
    "make_rollout_copy",
    "Sampler",
    "build_engine",
    "Run",
    "restored",
    "Tracker",
    "mark_opened",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_start_that_fails_halfway_leaves_nothing_open(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, closed = handlers(), list[Scoring]()
    close = Scoring.close

    def fail(*args: Any, **options: Any) -> Any:
        raise ConfigError(f"no {part}")

    def noted(self: Scoring) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(Scoring, "close", noted)
    with toy_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, part, fail)
        with pytest.raises(ConfigError, match=f"no {part}"), start(toy_config(tmp_path), None, Heard()):
            raise AssertionError("it has started")
    assert len(closed) == (PARTS.index(part) > PARTS.index("Scoring"))
    assert not (tmp_path / "toy" / NAME).exists()
    assert handlers() == before
    # the next try is a new run in the same place, where no record was begun
    if part != "mark_opened":
        with toy_run(tmp_path) as toy:
            assert toy.state.images == 0


def test_an_error_inside_ends_all_parts_and_is_raised(tmp_path: Path) -> None:
    before, error = handlers(), RuntimeError("a defect")
    with pytest.raises(RuntimeError) as caught, toy_run(tmp_path):
        raise error
    assert caught.value is error
    assert not (tmp_path / "toy" / NAME).exists()
    assert handlers() == before


def test_a_folder_that_is_refused_stays_as_it_was(tmp_path: Path) -> None:
    with toy_run(tmp_path) as toy:
        finish_iteration(toy.run, toy.state)
    before = {path: path.read_bytes() for path in (tmp_path / "toy").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already holds a run"), toy_run(tmp_path):
        pass
    assert {path: path.read_bytes() for path in (tmp_path / "toy").rglob("*") if path.is_file()} == before


def recorded(toy: Toy) -> list[int]:
    return [line["iteration"] for line in read_metrics(toy.run.folder.path / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("evaluated", "left"),
    [
        # the iteration whose evaluation is still due is recorded afterwards
        (False, [0]),
        (True, [0, 1]),
    ],
)
def test_a_run_goes_on_with_its_record_from_its_checkpoint(
    evaluated: bool, left: list[int], tmp_path: Path
) -> None:
    with toy_run(tmp_path) as toy:
        finish_iteration(toy.run, toy.state)
        iterate(toy.run, toy.state)
        if not evaluated:
            save(toy.run, toy.state)
        finish_iteration(toy.run, toy.state)
        if evaluated:
            save(toy.run, toy.state)
        iterate(toy.run, toy.state)
        finish_iteration(toy.run, toy.state)
        assert recorded(toy) == [0, 1, 2]
        newest = toy.run.folder.checkpoints.paths()[-1]
        assert newest.name == "iteration-000002"
        origin = toy.run.folder.checkpoints.paths()[0]
    with toy_run(tmp_path, "run.name=branch", resume=str(origin)) as branch:
        assert (branch.state.iteration, branch.state.images) == (1, 6)
        assert recorded(branch) == left
    with toy_run(tmp_path, resume="auto") as again:
        assert (again.state.iteration, again.state.images) == (2, 12)
        assert recorded(again) == [0, 1, 2]


def test_a_launch_that_is_started_anew_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[LaunchEnvironment]()
    monkeypatch.setattr(setup, "is_elastic_restart", lambda place: bool(opened))
    monkeypatch.setattr(setup, "mark_opened", opened.append)
    for started in (1, 2):
        with toy_run(tmp_path) as toy:
            assert opened == [LaunchEnvironment()] * started
            assert toy.state.iteration == started - 1
            iterate(toy.run, toy.state)
            finish_iteration(toy.run, toy.state)
            save(toy.run, toy.state)


@pytest.mark.parametrize("replica", ["none", "resident"])
def test_weights_that_are_spread_are_gathered_for_a_copy_or_for_every_call(
    replica: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = setup.build_engine

    def spread(*given: Any) -> Any:
        engine = build(*given)
        engine.sharded = True
        return engine

    monkeypatch.setattr(setup, "build_engine", spread)
    with toy_run(tmp_path, f"rollout.replica={replica}") as toy:
        sampler = toy.run.sampler
        # the addresses of what is gathered are others in every call, and a graph holds them
        assert sampler.steps._capture == (replica == "resident")
        assert sampler.rollout_copy is None or sampler.rollout_copy.gathered == toy.run.engine.gathered
        assert (sampler.rollout_copy is None) == (replica == "none")


@pytest.mark.parametrize(
    ("overrides", "new", "options", "called"),
    [
        ((), True, {"keep_reference": False, "cast": False, "sharded": False, "start": True}, []),
        (
            ("run.seed=7", "algorithm.kl_weight=0.1", "train.gradient_checkpointing=true"),
            False,
            {"keep_reference": True, "start": False, "seed": 7},
            ["gradient checkpointing"],
        ),
        (("distributed.zero_stage=2",), True, {"cast": True, "sharded": False}, []),
        (
            ("distributed.zero_stage=3", "model.free_text_encoder=true"),
            True,
            {"cast": True, "sharded": True},
            ["a cat", "a dog"],
        ),
    ],
)
def test_the_policy_is_loaded_as_it_is_trained(
    overrides: tuple[str, ...],
    new: bool,
    options: dict[str, Any],
    called: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, done = dict[str, Any](), list[str]()

    class Noted:
        def enable_gradient_checkpointing(self) -> None:
            done.append("gradient checkpointing")

        def free_text_encoder(self, prompts: list[str]) -> None:
            done.extend(prompts)

    def load_policy(model: Any, **options: Any) -> Noted:
        given.update(options)
        return Noted()

    monkeypatch.setattr(setup, "load_policy", load_policy)
    _policy(toy_config(tmp_path, *overrides), ["a cat", "a dog"], new=new)
    assert given | options == given
    assert done == called


@pytest.mark.parametrize(
    ("overrides", "trained", "size", "said"),
    [
        (
            ("train.step_fraction=0.2",),
            (0, 1),
            1,
            r"train\.step_fraction: found 0\.2, allowed: at least 0\.25, with",
        ),
        (
            (),
            (0, 1, 2),
            7,
            r"samples_per_prompt: found 6 image\(s\), allowed: at least 7, one for each process",
        ),
        (
            ("train.updates_per_iteration=18",),
            (0, 1),
            1,
            r"train\.updates_per_iteration: found 18, allowed: at most 12, the number of",
        ),
    ],
)
def test_too_few_pairs_are_an_error_that_names_the_key(
    overrides: tuple[str, ...], trained: tuple[int, ...], size: int, said: str, tmp_path: Path
) -> None:
    steps = StochasticSteps(schedule(), trained)
    with pytest.raises(ConfigError, match=said):
        _trained_per_trajectory(toy_config(tmp_path, *overrides), steps, World(LaunchEnvironment(size=size)))


@pytest.mark.parametrize(
    ("overrides", "trained", "expected"),
    [
        ((), (0, 1, 2), 3),
        (("train.step_fraction=0.25",), (0, 1), 1),
        (("train.updates_per_iteration=12",), (0, 1), 2),
        (("train.step_fraction=0.7",), (0, 1, 2), 2),
    ],
)
def test_a_pass_draws_the_fraction_of_the_steps(
    overrides: tuple[str, ...], trained: tuple[int, ...], expected: int, tmp_path: Path
) -> None:
    steps = StochasticSteps(schedule(), trained)
    assert (
        _trained_per_trajectory(toy_config(tmp_path, *overrides), steps, World(LaunchEnvironment(size=6)))
        == expected
    )
