from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loopfast.config import Config
from loopfast.rewards import Scores
from loopfast.rollout.trajectories import Trajectories
from loopfast.run.tracking import describe
from loopfast.training.metrics import iteration_metrics, rollout_metrics
from loopfast.training.state import Rollout, TrainState
from loopfast.training.update import UpdateStatistics
from tests.training.toys import toy_config


@pytest.mark.parametrize("bad", ["error", "drop_group"])
def test_the_metrics_of_a_rollout_are_those_of_the_prompts_that_are_kept(bad: str) -> None:
    nan, count = math.nan, {} if bad == "error" else {"dropped_groups": 1}
    # what is trained on may be normalized otherwise: metrics are of the scores
    rewards = torch.tensor([[10.0, 11.0], [nan, nan], [12.0, 13.0]])
    scores = Scores(
        torch.tensor([1.0, 3.0, 9.0, nan, 2.0, 8.0]), {"a": torch.tensor([0.0, 1.0, 5.0, nan, 2.0, 3.0])}
    )
    rollout = Rollout(
        Trajectories(torch.zeros(2, 6, 1), torch.zeros(1, 6)), rewards, torch.tensor([True, False, True])
    )
    found = rollout_metrics(scores, rollout, count_dropped=bad == "drop_group")
    assert found == {
        "reward_mean": 3.5,
        "reward_std": pytest.approx(math.sqrt((2.5**2 + 0.5**2 + 1.5**2 + 4.5**2) / 4)),
        "group_spread": 2.0,
        "reward_a": 1.5,
        **count,
    }
    assert all(describe(name) for name in found)


def make_run(config: Config) -> Any:
    return SimpleNamespace(config=config)


def stated() -> TrainState:
    """After three updates of an iteration that took two seconds."""
    statistics = [
        UpdateStatistics(
            loss=number,
            kl=0.1 * number,
            kl_reference=number,
            clip_fraction=0.25 * number,
            ratio_outside_clip=0.125 * number,
            ratio_max_deviation=0.5 / number,
            logprob_change=number,
            zero_gradient=0.0,
            screened_out=0.0,
            grad_norm=number,
            learning_rate=1e-3 * number,
            overflows=int(number),
        )
        for number in (1.0, 2.0, 3.0)
    ]
    metrics = {"seconds_iteration": 2.0, "seconds_model": 0.5, "model_calls": 12, "reward_mean": 4.0}
    return TrainState(updates=[asdict(update) for update in statistics], metrics=metrics)


def test_the_metrics_of_an_iteration_are_means_over_its_updates(tmp_path: Path) -> None:
    state = stated()
    found = iteration_metrics(make_run(toy_config(tmp_path)), state)
    assert found == {
        **state.metrics,
        "images_per_second": 3.0,
        "model_calls_per_second": 6.0,
        "outside_model_share": 0.75,
        "loss": 2.0,
        "kl": pytest.approx(0.2),
        "clip_fraction": 0.5,
        "ratio_outside_clip": 0.25,
        "logprob_change": 2.0,
        "zero_gradient": 0.0,
        "screened_out": 0.0,
        "grad_norm": 2.0,
        # not means: before the first update the ratio is the one that should be 1
        "ratio_max_deviation": 0.5,
        "on_policy_outside_clip": 0.125,
        "learning_rate": 3e-3,
    }
    assert all(describe(name) for name in found)


@pytest.mark.parametrize(
    ("override", "more"),
    [("algorithm.kl_weight=0.1", {"kl_reference": 2.0}), ("model.dtype=float16", {"overflows": 6})],
)
def test_what_only_some_runs_have(override: str, more: dict[str, Any], tmp_path: Path) -> None:
    plain, found = (
        iteration_metrics(make_run(config), stated())
        for config in (toy_config(tmp_path), toy_config(tmp_path, override))
    )
    assert found == {**plain, **more}


@pytest.mark.parametrize(("dtype", "more"), [("float32", {}), ("float16", {"overflows": 5})])
def test_updates_of_an_earlier_versions_checkpoint_count_no_overflows(
    dtype: str, more: dict[str, int], tmp_path: Path
) -> None:
    config, state = toy_config(tmp_path, f"model.dtype={dtype}"), stated()
    expected = iteration_metrics(make_run(config), state) | more
    del state.updates[0]["overflows"]
    assert iteration_metrics(make_run(config), state) == expected
