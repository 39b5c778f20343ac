from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import World
from loopfast.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    LoopfastError,
    NonFiniteError,
    RewardError,
    WriteError,
)
from loopfast.rewards import RewardMemoryError
from loopfast.run.checkpoints import Checkpoint
from loopfast.training.run import Run, Stopped
from loopfast.training.saving import restored, save, save_once, saved_on_failure
from loopfast.training.state import TrainState
from loopfast.training.train import finish_iteration, iterate
from tests.training.toys import MakeToy, Toy, same


def contents(run: Run, state: TrainState) -> dict[str, Any]:
    """All that a run goes on from, in what can be compared."""
    tensors, engine = run.engine.state()
    rollout = state.rollout
    if rollout is not None:
        sampled = rollout.trajectories
        tensors["rollout"] = {
            "latents": sampled.latents,
            "logprob": sampled.logprob,
            "rewards": rollout.rewards.nan_to_num(-1.0),
            "kept": rollout.kept,
        }
    values = {
        f"{group}.{name}": value.tolist() for group, named in tensors.items() for name, value in named.items()
    }
    plain = ("iteration", "images", "pending", "metrics", "updates", "zero_gradient", "position")
    return {
        **values,
        **{name: getattr(state, name) for name in plain},
        "engine": engine,
        "history": state.statistics.state_dict(),
        "sizes": (run.microbatches.rollout, run.microbatches.train, run.sampler.microbatch),
    }


def checkpoint(toy: Toy) -> Checkpoint:
    return toy.run.folder.checkpoints.load(save(toy.run, toy.state))


def begin(toy: Toy) -> None:
    """A run that has done nothing, not even its evaluation."""


def complete(toy: Toy) -> None:
    """An iteration that is not evaluated nor recorded yet."""
    finish_iteration(toy.run, toy.state)
    iterate(toy.run, toy.state)


def sampled(toy: Toy) -> None:
    """An iteration of whose images nothing is learned yet."""
    complete(toy)
    toy.sampled()


def between(toy: Toy) -> None:
    """An iteration with a part of its updates done."""
    complete(toy)
    toy.stopped(2)


MOMENTS = {
    begin: ("iteration-000000", 0),
    complete: ("iteration-000001", 6),
    sampled: ("iteration-000001", 12),
    between: ("iteration-000001-update-2", 12),
}


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm.name=ppo", "train.inner_epochs=2", "train.ema_decay=0.9"),
        (
            "trajectories.device=host",
            "algorithm.kl_weight=0.1",
            "rollout.dtype=bfloat16",
            "rollout.microbatch=4",
        ),
    ],
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_state_comes_back_from_its_checkpoint(
    moment: Callable[[Toy], None], overrides: tuple[str, ...], make_toy: MakeToy
) -> None:
    overrides = (*overrides, "train.on_policy_check=off")
    toy = make_toy(*overrides)
    toy.run.microbatches.halve("train", "as a test says")
    toy.run.resize(toy.run.microbatches.rollout)
    moment(toy)
    other = make_toy(*overrides)
    saved = checkpoint(toy)
    name, images = MOMENTS[moment]
    assert (saved.path.name, toy.state.images) == (name, images)
    state = restored(other.run, saved)
    expected = contents(toy.run, toy.state)
    assert contents(other.run, state) == expected
    assert expected["sizes"] != contents(make_toy(*overrides).run, TrainState())["sizes"]
    assert state.elapsed >= state.seconds == toy.state.seconds > 0
    assert other.heard.warnings == []


def test_a_new_run_has_a_new_state(make_toy: MakeToy) -> None:
    toy = make_toy()
    assert contents(toy.run, restored(toy.run, None)) == contents(toy.run, TrainState())


def test_the_time_until_then_is_accounted_for_where_images_are_kept(make_toy: MakeToy) -> None:
    toy = make_toy()
    toy.run.meter.start()
    save(toy.run, toy.state)
    assert (toy.run.meter.running, toy.state.metrics) == (True, {})
    toy.stopped()
    save(toy.run, toy.state)
    assert not toy.run.meter.running
    assert toy.state.metrics["seconds_iteration"] > toy.state.metrics["seconds_replay"] > 0
    assert toy.state.metrics["model_calls"] == 4


@pytest.mark.parametrize("wrong", ["engine", "iteration", "prompt_statistics", "policy", "optimizer"])
def test_a_checkpoint_of_another_model_is_refused(wrong: str, make_toy: MakeToy) -> None:
    toy = make_toy()
    complete(toy)
    saved = checkpoint(toy)
    if wrong == "policy":
        saved.tensors["policy"]["weight"] = torch.zeros(3, 3)
    elif wrong == "optimizer":
        saved.tensors["optimizer"]["weight.state1"] = torch.zeros(4, 4)
    else:
        del saved.state[wrong]
    with pytest.raises(CheckpointError) as caught:
        restored(toy.run, saved)
    assert str(caught.value).startswith(f"checkpoint {saved.path} cannot be resumed: ")


def other_prompts(folder: Path) -> tuple[str, ...]:
    (folder / "other.txt").write_text("a black square\na yellow ring\na cube", "utf-8")
    return (f"prompts.source={folder / 'other.txt'}",)


def other_evaluation(folder: Path) -> tuple[str, ...]:
    (folder / "other.txt").write_text("a black square", "utf-8")
    return (f"evaluation.prompts={folder / 'other.txt'}",)


Change = Callable[[Path], tuple[str, ...]]
CHANGES: dict[Change, tuple[str, bool]] = {
    other_prompts: ("prompts.source holds other prompts", True),
    other_evaluation: ("evaluation.prompts holds other prompts", False),
    lambda folder: ("train.steps=0:2", "train.on_policy_check=off"): ("the schedule is another", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_of_other_prompts_or_steps_are_sampled_anew(
    change: Change, make_toy: MakeToy, tmp_path: Path
) -> None:
    (tmp_path / "evaluated.txt").write_text("a white ring", "utf-8")
    evaluated = f"evaluation.prompts={tmp_path / 'evaluated.txt'}"
    toy = make_toy(evaluated)
    between(toy)
    other = make_toy(evaluated, *change(tmp_path))
    state = restored(other.run, checkpoint(toy))
    said, anew = CHANGES[change]
    consequence = "iteration 2 is sampled anew" if anew else "the run goes on with the present ones"
    assert other.heard.warnings == [f"{said} than when iteration-000001-update-2 was saved; {consequence}"]
    assert same(other.weights, toy.weights)
    # they were sampled, and paid for
    assert state.images == toy.state.images == 12
    assert (state.rollout is None, state.updates == [], state.metrics == {}) == (anew, anew, anew)


@pytest.mark.parametrize(
    ("keys", "change", "lost"),
    [
        (("microbatch",), None, {"sizes": (6, 6, 6)}),
        (("zero_gradient",), None, {"zero_gradient": 0.0}),
        (("data", "sampled"), other_prompts, {}),
    ],
)
def test_a_checkpoint_of_an_earlier_version_may_lack_some_keys(
    keys: tuple[str, ...], change: Change | None, lost: dict[str, Any], make_toy: MakeToy, tmp_path: Path
) -> None:
    toy = make_toy("algorithm.clip_range=0.01")
    toy.run.microbatches.halve("train", "as a test says")
    between(toy)
    saved, expected = checkpoint(toy), contents(toy.run, toy.state)
    assert expected["zero_gradient"] > 0
    for key in keys:
        del saved.state[key]
    other = make_toy("algorithm.clip_range=0.01", *(change(tmp_path) if change else ()))
    assert contents(other.run, restored(other.run, saved)) == {**expected, **lost}
    assert other.heard.warnings == []


@pytest.mark.parametrize("moment", [complete, between])
def test_a_reward_that_has_changed_is_named(moment: Callable[[Toy], None], make_toy: MakeToy) -> None:
    toy = make_toy()
    moment(toy)
    other = make_toy()
    [file] = toy.run.reward_identity
    assert file == "the file of reward 'tests.training.toys:first_pixel'"
    other.run.reward_identity = {file: "another"}
    saved = checkpoint(toy)
    state = restored(other.run, saved)
    anew = moment is between
    consequence = "iteration 2 is sampled anew" if anew else "the run goes on with the present ones"
    assert other.heard.warnings == [f"{file} is another than when {saved.path.name} was saved; {consequence}"]
    assert state.rollout is None


def test_a_state_is_written_once(make_toy: MakeToy) -> None:
    toy = make_toy()
    path = save_once(toy.run, toy.state)
    (path / "mark").touch()
    assert save_once(toy.run, toy.state) == path
    assert (path / "mark").exists()
    finish_iteration(toy.run, toy.state)  # the same name, another state
    assert save_once(toy.run, toy.state) == path
    assert not (path / "mark").exists()
    toy.stopped()
    assert save_once(toy.run, toy.state).name == "iteration-000000-update-1"


def test_a_checkpoint_has_the_evaluations_reward(make_toy: MakeToy) -> None:
    toy = make_toy()
    best = save(toy.run, toy.state, 2.0)
    complete(toy)
    assert save(toy.run, toy.state, 1.0) != best
    assert toy.run.folder.checkpoints.best() == best


def checkpoints(toy: Toy) -> list[str]:
    return [path.name for path in toy.run.folder.checkpoints.paths()]


def fail(toy: Toy, error: BaseException) -> None:
    with saved_on_failure(toy.run, toy.state):
        raise error


def record_is_closed(toy: Toy) -> bool:
    assert toy.run.tracker is not None
    return toy.run.tracker._file.closed


@pytest.mark.parametrize("kind", [RewardError, RewardMemoryError, WriteError])
def test_the_state_is_saved_where_a_reward_or_a_full_disk_ends_the_run(
    kind: type[LoopfastError], make_toy: MakeToy
) -> None:
    toy, error = make_toy(), kind("no luck")
    with pytest.raises(kind) as caught:
        fail(toy, error)
    saved = toy.run.folder.path / "checkpoints" / "iteration-000000"
    assert str(caught.value) == f"no luck; {saved} is saved, --resume auto goes on from there"
    assert caught.value.__cause__ is error
    assert checkpoints(toy) == ["iteration-000000"]
    assert record_is_closed(toy)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_stop_saves_the_state_and_has_the_signals_code(number: int, code: int, make_toy: MakeToy) -> None:
    toy = make_toy()
    signal.raise_signal(number)
    with pytest.raises(Interrupted) as caught:
        fail(toy, Stopped())
    saved = toy.run.folder.path / "checkpoints" / "iteration-000000"
    assert str(caught.value) == f"stopped; {saved} is saved, --resume auto goes on from there"
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (code, True)
    assert checkpoints(toy) == ["iteration-000000"]


@pytest.mark.parametrize(
    "error", [NonFiniteError("nan"), ConfigError("no"), RuntimeError("a defect"), KeyboardInterrupt()]
)
def test_another_error_is_left_as_it_is_and_saves_nothing(error: BaseException, make_toy: MakeToy) -> None:
    toy = make_toy()
    with pytest.raises(type(error)) as caught:
        fail(toy, error)
    assert caught.value is error
    assert checkpoints(toy) == []
    assert record_is_closed(toy)


def test_nothing_is_saved_where_nothing_fails(make_toy: MakeToy) -> None:
    toy = make_toy()
    with saved_on_failure(toy.run, toy.state):
        pass
    assert checkpoints(toy) == []
    assert not record_is_closed(toy)


def test_an_error_of_one_process_alone_saves_nothing(
    make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, error = make_toy(), RewardError("no luck")
    # the others do not come to save
    monkeypatch.setattr(toy.run, "world", World(LaunchEnvironment(size=2)))
    with pytest.raises(RewardError) as caught:
        fail(toy, error)
    assert caught.value is error
    assert checkpoints(toy) == []


def test_a_state_that_cannot_be_saved_is_said(make_toy: MakeToy) -> None:
    toy = make_toy()
    place = toy.run.folder.path / "checkpoints"
    place.write_text("in the way")
    unsaved = f"cannot save checkpoint iteration-000000 in {place}: "
    with pytest.raises(RewardError) as caught:
        fail(toy, RewardError("no luck"))
    assert str(caught.value).startswith(f"no luck; {unsaved}")
    with pytest.raises(CheckpointError) as missed:
        fail(toy, Stopped())
    assert str(missed.value).startswith(unsaved)


def test_a_record_that_cannot_be_closed_hides_no_error(make_toy: MakeToy) -> None:
    toy = make_toy()
    tracker: Any = toy.run.tracker
    tracker._file = Path("/dev/full").open("w")  # noqa: SIM115 - the tracker closes it
    tracker._file.write("a line")
    with pytest.raises(NonFiniteError, match="nan"):
        fail(toy, NonFiniteError("nan"))
