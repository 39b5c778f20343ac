from __future__ import annotations

import time

import torch

from loopfast.algorithms import PromptStatistics
from loopfast.profiling import Times
from loopfast.rollout.trajectories import Trajectories
from loopfast.training.state import Rollout, TrainState


def rollout(rewards: list[list[float]]) -> Rollout:
    count = sum(map(len, rewards))
    kept = torch.ones(len(rewards), dtype=torch.bool)
    return Rollout(Trajectories(torch.zeros(3, count, 1), torch.zeros(2, count)), torch.tensor(rewards), kept)


def test_a_new_run_has_its_first_evaluation_before_it() -> None:
    state = TrainState()
    assert state.pending == {"iteration": 0, "images": 0}
    assert (state.number, state.position) == (0, (0, 0, False, False))


def test_two_states_are_told_apart_by_what_is_done() -> None:
    state = TrainState()
    positions = [state.position]
    state.pending = None
    positions.append(state.position)
    state.rollout = rollout([[0.0, 1.0]])
    positions.append(state.position)
    state.updates.append({"loss": 1.0})
    positions.append(state.position)
    state.complete({}, state.statistics)
    positions.append(state.position)
    assert len(set(positions)) == 5
    assert positions[-1] == (1, 0, False, False)


def test_the_number_is_that_of_the_iteration_whose_images_there_are() -> None:
    state = TrainState(iteration=4, pending=None)
    assert state.number == 5
    state.complete({}, state.statistics)
    assert (state.iteration, state.number) == (5, 5)


def test_accounts_add_up_until_the_iteration_is_complete() -> None:
    state = TrainState(metrics={"seconds_checkpoint": 1.0})
    state.account(Times(4.0, {"rollout": 3.0}, {"rollout": 2.0, "": 0.5}, {"denoiser": 6, "reward": 2}))
    last = Times(2.0, {"rollout": 0.5, "replay": 1.0}, {"replay": 1.0})
    state.account(last)
    assert state.metrics == {
        "seconds_checkpoint": 1.0,
        "seconds_rollout": 3.5,
        "seconds_replay": 1.0,
        "seconds_iteration": 6.0,
        "seconds_model": 3.5,
        "model_calls": 6,
    }
    assert state.times is last


def test_a_complete_iteration_waits_for_its_record_and_leaves_nothing_to_the_next() -> None:
    state = TrainState(iteration=2, images=18, pending=None, metrics={"loss": 3.0}, updates=[{"loss": 3.0}])
    state.rollout, history = rollout([[0.0, 1.0]]), PromptStatistics()
    history.load_state_dict({"a": [1.0]})
    state.complete({"loss": 2.0}, history)
    assert state.iteration == 3
    assert state.pending == {"iteration": 3, "images": 18, "loss": 2.0}
    assert (state.metrics, state.updates, state.rollout) == ({}, [], None)
    assert state.statistics is history


def test_images_that_are_given_up_are_not_counted() -> None:
    state = TrainState(images=18)
    state.discard_rollout()
    assert state.images == 18
    state.rollout = rollout([[0.0, 1.0], [0.0, 1.0]])
    for _ in range(2):
        state.discard_rollout()
        assert (state.images, state.rollout) == (14, None)


def test_time_is_that_since_the_run_would_have_begun() -> None:
    state = TrainState(began=time.perf_counter() - 5000.0)
    assert 5000.0 <= state.elapsed < 9000.0
