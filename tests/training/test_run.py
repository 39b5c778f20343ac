from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from loopfast.algorithms import ALGORITHMS
from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import World
from loopfast.errors import LoopfastError
from loopfast.training.run import Stopped
from tests.training.toys import MakeToy


def test_an_iteration_samples_all_images_of_its_prompts(make_toy: MakeToy) -> None:
    run = make_toy("rollout.prompts_per_iteration=5", "algorithm.samples_per_prompt=3").run
    assert run.config.images_per_iteration == 15


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_screening_is_off_where_it_finds_nothing(name: str, kl_weight: float, make_toy: MakeToy) -> None:
    toy = make_toy(f"algorithm.name={name}", f"algorithm.kl_weight={kl_weight}")
    possible = kl_weight == 0 and name in ("loop", "ppo", "grpo")
    assert toy.run.screening == ("auto" if possible else "off")


@pytest.mark.parametrize("screening", ["on", "off"])
def test_screening_is_what_was_asked_for_where_it_is_possible(screening: str, make_toy: MakeToy) -> None:
    assert make_toy(f"train.screening={screening}").run.screening == screening


@pytest.mark.parametrize(
    ("given", "device", "worker"),
    [
        ("auto", "cpu", "inline"),
        ("auto", "cuda", "thread"),
        ("none", "cuda", "none"),
        ("thread", "cpu", "thread"),
    ],
)
def test_auto_scores_beside_the_sampling_on_a_gpu(
    given: str, device: str, worker: str, make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy(f"rollout.reward_worker={given}")
    monkeypatch.setattr(toy.policy, "device", torch.device(device))
    assert toy.run.reward_worker == worker


def test_recorded_steps_are_freed_when_a_call_takes_other_rows(make_toy: MakeToy) -> None:
    toy = make_toy()
    toy.sampled()
    before, steps = toy.run.sampler, toy.run.sampler.steps
    assert toy.run.resize(before.microbatch) is toy.run.sampler is before
    assert len(steps) == 1
    found = toy.run.resize(2)
    assert found is toy.run.sampler is not before
    assert (found.microbatch, len(steps)) == (2, 0)
    assert found.steps is steps


def test_a_phase_is_shown_and_accounted_for(make_toy: MakeToy) -> None:
    toy = make_toy()
    toy.run.meter.start()
    with toy.run.phase("replay"):
        pass
    assert list(toy.run.meter.stop().phases) == toy.heard.phases == ["replay"]


def test_a_signal_stops_the_run_where_it_looks_for_one(make_toy: MakeToy) -> None:
    run = make_toy().run
    run.check_stop()
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(Stopped):
        run.check_stop()


@pytest.mark.parametrize(
    ("size", "shared", "together"), [(1, False, True), (2, False, False), (2, True, True)]
)
def test_processes_can_save_together_after_an_error_that_all_have(
    size: int, shared: bool, together: bool, make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, error = make_toy().run, LoopfastError("wrong")
    error.on_all_ranks = shared
    monkeypatch.setattr(run, "world", World(LaunchEnvironment(size=size)))
    assert run.raised_on_all_ranks(error) == together


def test_the_record_can_be_closed_where_there_is_one(make_toy: MakeToy) -> None:
    run = make_toy().run
    tracker: Any = run.tracker
    run.close_tracker()
    with pytest.raises(ValueError, match="closed file"):
        tracker.record({"iteration": 1})
    run.tracker = None
    run.close_tracker()
