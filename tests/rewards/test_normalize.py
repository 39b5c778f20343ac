"""Rewards brought to one scale before they are summed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loopfast.training.train as training
from loopfast.algorithms import EPSILON
from loopfast.config import Config, RewardConfig
from loopfast.errors import ConfigError, RewardError
from loopfast.rewards import RewardSet, RewardTerm, Scores, build_rewards, training_rewards
from loopfast.run.console import Display
from loopfast.run.tracking import read_metrics

MakeConfig = Callable[..., Config]

VALUES = torch.tensor([1.0, 4.0, 2.0, 9.0, 3.0, 5.0])


def scores(**parts: Tensor) -> Scores:
    return Scores(torch.stack(list(parts.values())).sum(0), parts)


def standardized(values: Tensor) -> Tensor:
    values = values.double()
    return (values - values.mean()) / (values.std(correction=0) + EPSILON)


def test_a_range_is_a_straight_line_in_every_sum() -> None:
    rewards = RewardSet(
        [
            RewardTerm("a", lambda *_: VALUES, weight=2.0, range=(1.0, 5.0)),
            RewardTerm("b", lambda *_: VALUES, weight=-1.0),
        ]
    )
    found = rewards.score(torch.zeros(6, 3, 2, 2), [""] * 6)
    torch.testing.assert_close(found.total, 2 * (VALUES - 1) / 4 - VALUES)
    assert torch.equal(found.parts["a"], VALUES)
    terms = [
        RewardConfig(name="a", weight=2.0, normalize="range", range=(1.0, 5.0)),
        RewardConfig(name="b", weight=-1.0),
    ]
    assert torch.equal(training_rewards(terms, found, 2)[0].flatten(), found.total)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prompt_is_kept_where_all_its_rewards_are_numbers(bad: float) -> None:
    total = torch.tensor([1.0, 2.0, 3.0, bad, bad, bad, 4.0, 4.0])
    rewards, kept = training_rewards([], Scores(total, {}), 2)
    assert kept.tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert torch.equal(rewards[kept].flatten(), total[[0, 1, 6, 7]])
    assert rewards[~kept].isnan().all()


def test_a_configurations_range_reaches_the_sum() -> None:
    term = RewardConfig(name="jpeg_compressibility", label="small", normalize="range", range=(-10.0, 0.0))
    found = build_rewards([term]).score(torch.rand(2, 3, 16, 16), ["", ""])
    torch.testing.assert_close(found.total, (found.parts["small"] + 10) / 10)


def test_std_is_of_all_images_that_count() -> None:
    other = torch.tensor([10.0, 20.0, 60.0, 20.0, 10.0, 10.0])
    terms = [
        RewardConfig(name="a", weight=2.0, normalize="std"),
        RewardConfig(name="b", weight=0.5, normalize="range", range=(0.0, 10.0)),
    ]
    found, _ = training_rewards(terms, scores(a=VALUES, b=other), 2)
    expected = 2 * standardized(VALUES) + 0.5 * other.double() / 10
    torch.testing.assert_close(found.flatten(), expected.float())
    # of a prompt of which one image has no score none counts
    other[3] = torch.nan
    found, _ = training_rewards(terms, scores(a=VALUES, b=other), 2)
    kept = torch.tensor([0, 1, 4, 5])
    assert found[1].isnan().all()
    expected = 2 * standardized(VALUES[kept]) + 0.5 * other[kept].double() / 10
    torch.testing.assert_close(found[[0, 2]].flatten(), expected.float())


@pytest.mark.parametrize("value", [3.0, 0.1, 612.3, -100000.3])
def test_equal_values_are_0(value: float) -> None:
    term = RewardConfig(name="a", normalize="std")
    found, _ = training_rewards([term], scores(a=torch.full((42,), value)), 2)
    assert found.count_nonzero() == 0


def test_a_sum_that_overflows_is_reported() -> None:
    term = RewardConfig(name="a", normalize="std", weight=1e39)
    with pytest.raises(RewardError, match="sum of the normalized rewards is not finite"):
        training_rewards([term], scores(a=VALUES), 2)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("[{name: embedded, normalize: range}]", "reward.0.range: found null, allowed: two numbers"),
        ("[{name: embedded, normalize: range, range: [1, 0]}]", "reward.0.range: found a list, allowed: two"),
        ("[{name: embedded, normalize: range, range: [1]}]", "reward.0.range: found a list, allowed: two"),
        ("[{name: embedded, range: [0, 1]}]", "reward.0.range: found a list, allowed: null without"),
        (
            "[{name: embedded, normalize: max}]",
            "reward.0.normalize: found 'max', allowed: none or range or std",
        ),
        ("[{name: embedded, range: [a]}]", "reward.0.range"),
        (
            "[{name: http, label: x}, {name: http, label: x}]",
            "reward.1.label: found 'x', allowed: each reward once",
        ),
        ("[{name: http, label: mean}]", "reward.0.label: found 'mean', allowed: none of mean, std"),
    ],
)
def test_what_cannot_be_normalized(reward: str, said: str, small_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(f"reward={reward}")
    assert said in str(caught.value)


def test_training_goes_by_the_standardized_sum_and_metrics_by_the_plain_one(small_config: MakeConfig) -> None:
    reward = "reward=[{name: jpeg_compressibility, normalize: std}, {name: embedded, weight: 0.1}]"

    def run(name: str, *options: str) -> tuple[list[dict[str, float]], Path]:
        short = ("train.iterations=1", "rollout.prompts_per_iteration=2", "rollout.steps=2")
        sizes = ("rollout.microbatch=3", "train.microbatch=3", "evaluation.limit_prompts=2")
        config = small_config(reward, *short, *sizes, f"run.name={name}", *options)
        folder = training.train(config, display=Display(quiet=True))
        return read_metrics(folder / "metrics.jsonl"), folder

    first, folder = run("parts")
    other, _ = run("whole", "rollout.reward_worker=none")
    for line in (*first, *other):
        if line["iteration"]:
            assert line["reward_mean"] == pytest.approx(
                line["reward_jpeg_compressibility"] + 0.1 * line["reward_embedded"], rel=1e-5
            )
    assert first[1]["loss"] == other[1]["loss"]
    assert first[1]["grad_norm"] == other[1]["grad_norm"]
    plain, _ = run("plain", reward.replace(", normalize: std", ""))
    assert first[1]["reward_mean"] == plain[1]["reward_mean"]
    assert first[1]["grad_norm"] != plain[1]["grad_norm"]
    items = json.loads((folder / "evaluation" / "iteration-000001.json").read_text("utf-8"))["items"]
    for item in items:
        parts = item["parts"]
        assert item["reward"] == pytest.approx(parts["jpeg_compressibility"] + 0.1 * parts["embedded"])
