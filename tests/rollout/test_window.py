"""Steps that draw noise, steps that do not, and which of them are trained on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import loopfast.training.train as training
from loopfast.config import Config, parse_config
from loopfast.errors import ConfigError, Interrupted
from loopfast.rollout import stochastic_steps
from loopfast.run.console import Display
from loopfast.run.tracking import read_metrics
from loopfast.schedules import TransitionSchedule, transition_schedule
from tests.rollout import toy

MakeConfig = Callable[..., Config]


@pytest.fixture(params=["epsilon", "v_prediction", "sample", "flow"])
def schedules(request: pytest.FixtureRequest) -> tuple[TransitionSchedule, TransitionSchedule]:
    """With noise and without."""
    if request.param == "flow":
        flow = FlowMatchEulerDiscreteScheduler()
        return transition_schedule(flow, 8), transition_schedule(flow, 8, noise_level=0.0)
    ddim = DDIMScheduler(clip_sample=False, prediction_type=request.param)
    return transition_schedule(ddim, 8, eta=0.8), transition_schedule(ddim, 8, eta=0.0)


def test_steps_outside_are_those_of_the_deterministic_sampler(
    schedules: tuple[TransitionSchedule, TransitionSchedule],
) -> None:
    noisy, plain = schedules
    part = noisy.stochastic_in(2, 5)
    for step in range(8):
        expected = noisy if 2 <= step < 5 else plain
        assert torch.equal(part.table64[step], expected.table64[step])
        assert torch.equal(part.table[step], expected.table[step])
        assert part.sensitivity[step] == (noisy.sensitivity[step] if 2 <= step < 5 else 0)
    assert torch.equal(part.timesteps, noisy.timesteps)
    assert part.trained_steps("all") == (2, 3, 4)
    assert (part.table64[[0, 7], 2] == 0).all()
    for bounds in ((0, 9), (-1, 3), (3, 3), (5, 2)):
        with pytest.raises(ValueError, match="outside the schedule"):
            noisy.stochastic_in(*bounds)


def test_a_range_draws_noise_inside_alone(pipeline_folder: Path) -> None:
    whole = toy.schedule(pipeline_folder)
    steps = stochastic_steps(whole, "1:3", "all")
    assert (steps.trained_steps, steps.count) == ((1, 2), 2)
    assert stochastic_steps(whole, ":3", "1:").trained_steps == (1, 2)
    policy = toy.load(pipeline_folder)
    made = toy.sampler(policy, pipeline_folder)
    schedule, trained = steps.for_iteration(0, 7)
    assert trained == (1, 2)
    found = toy.run(replace(made, schedule=schedule))
    assert (found.logprob[[0, 3]] == 0).all()
    assert (found.logprob[[1, 2]] != 0).all()
    # the initial noise is the same, and all further noise is drawn later
    assert torch.equal(found.latents[0], toy.run(made).latents[0])
    assert torch.equal(
        toy.run(replace(toy.sampler(policy, pipeline_folder), schedule=schedule)).latents, found.latents
    )


def test_a_window_is_drawn_anew_for_each_iteration(pipeline_folder: Path) -> None:
    whole = toy.schedule(pipeline_folder)
    steps = stochastic_steps(whole, "window:2", "all")
    windows = [steps.for_iteration(3, iteration) for iteration in range(60)]
    assert {trained for _, trained in windows} == {(0, 1), (1, 2), (2, 3)}
    for schedule, trained in windows:
        assert tuple((schedule.table64[:, 2] > 0).nonzero().flatten().tolist()) == trained
        assert torch.equal(schedule.table64[list(trained)], whole.table64[list(trained)])
    assert [t for _, t in windows] == [steps.for_iteration(3, iteration)[1] for iteration in range(60)]
    assert [t for _, t in windows] != [steps.for_iteration(4, iteration)[1] for iteration in range(60)]
    assert steps.count == 2
    # all steps of a window are trained on
    assert {stochastic_steps(whole, "window:2", "1:").for_iteration(0, i)[1] for i in range(30)} == {
        (1, 2),
        (2, 3),
    }
    with pytest.raises(
        ConfigError, match=r"rollout\.stochastic_steps: found window:3, allowed: a window that"
    ):
        stochastic_steps(whole, "window:3", "0:2")


@pytest.mark.parametrize(
    ("overrides", "key", "allowed"),
    [
        (["rollout.stochastic_steps=window:11"], "rollout.stochastic_steps", "at most 10 steps"),
        (
            ["rollout.stochastic_steps=window:4", "train.steps=2:5"],
            "rollout.stochastic_steps",
            "a window of at most 3 steps, the number that train.steps selects",
        ),
        (["rollout.stochastic_steps=4:11"], "rollout.stochastic_steps", "inside 0:10"),
        (["rollout.stochastic_steps=5:5"], "rollout.stochastic_steps", "START < STOP"),
        (["rollout.stochastic_steps=0:4", "train.steps=4:6"], "rollout.stochastic_steps", "shares a step"),
        (
            [
                "rollout.stochastic_steps=window:2",
                "rollout.prompts_per_iteration=1",
                "train.updates_per_iteration=9",
            ],
            "train.updates_per_iteration",
            "at most 8",
        ),
        (["rollout.merge_lora=true"], "rollout.merge_lora", "false with model.tune: full"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused(overrides: list[str], key: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config("model: {pretrained: embedded}", overrides)
    assert f"{key}: found " in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("spec", ["all", "0:4", ":10", "window:10", "window:1", "9:"])
def test_steps_that_fit_are_taken(spec: str) -> None:
    config = parse_config("model: {pretrained: embedded}", [f"rollout.stochastic_steps='{spec}'"])
    assert config.rollout.stochastic_steps == spec


class Stops(Display):
    """Sends this process SIGINT in the nth phase of a name."""

    def __init__(self, name: str, times: int) -> None:
        super().__init__(quiet=True)
        self._name, self._left = name, times

    def phase(self, name: str) -> None:
        super().phase(name)
        self._left -= name == self._name
        if name == self._name and self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_window_trains_its_share_and_a_resumed_run_the_same_windows(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[int]] = []
    original = training.update

    def update(*arguments: object, **options: object) -> object:
        _, steps = arguments[2]  # type: ignore[misc]
        trained.append(set(steps.tolist()))
        assert len(steps) == 4 * 2 // 2
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "update", update)
    short = ("rollout.prompts_per_iteration=2", "evaluation.every=0", "evaluation.limit_prompts=1")
    options = (
        "rollout.steps=4",
        "rollout.stochastic_steps=window:2",
        "train.iterations=3",
        "run.seed=2",
        *short,
    )
    whole = training.train(small_config(*options, "run.name=whole"), display=Display(quiet=True))
    windows, trained = trained, []
    assert all(window in ({0, 1}, {1, 2}, {2, 3}) for window in windows)
    assert windows[::2] == windows[1::2]
    assert len({tuple(window) for window in windows}) > 1
    lines = read_metrics(whole / "metrics.jsonl")[1:]
    assert [line["ratio_max_deviation"] for line in lines] == [0.0] * 3

    config = small_config(*options, "checkpoint.every=50")
    with pytest.raises(Interrupted):
        training.train(config, display=Stops("replay", 4))
    again = training.train(config, resume="auto", display=Display(quiet=True))
    assert trained == windows
    names = ("reward_mean", "loss", "grad_norm")
    for line, other in zip(lines, read_metrics(again / "metrics.jsonl")[1:], strict=True):
        assert [line[name] for name in names] == [other[name] for name in names]
