from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopfast.algorithms import ALGORITHMS, EPSILON, PromptStatistics, advantages, deviations, spread
from loopfast.config import parse_config
from loopfast.errors import ConfigError

PROMPTS = ["a", "b"]
REWARDS = [[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]

# Worked out by hand from REWARDS, before dividing by anything.
DIFFERENCES = {
    "loop": [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]],
    "ppo": [[-1.0, 0.0, 4.0], [-2.0, -2.0, 1.0]],
    "rloo": [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]],
    "reinforce": [[-1.0, 0.0, 4.0], [-2.0, -2.0, 1.0]],
    "reinforce_plain": REWARDS,
    "grpo": [[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]],
}
SPREADS = {
    "loop": [statistics.pstdev([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0])] * 2,
    "ppo": [statistics.pstdev([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])] * 2,
    "rloo": [1.0, 1.0],
    "reinforce": [1.0, 1.0],
    "reinforce_plain": [1.0, 1.0],
    "grpo": [statistics.pstdev(row) for row in REWARDS],
}


def product(
    name: str,
    normalize: str = "auto",
    rewards: list[list[float]] = REWARDS,
    prompts: list[str] = PROMPTS,
) -> torch.Tensor:
    difference, scale = advantages(
        ALGORITHMS[name],
        torch.tensor(rewards),
        prompts,
        PromptStatistics(),
        normalize=normalize,  # type: ignore[arg-type]
    )
    return difference * scale


def test_the_table_is_complete() -> None:
    assert set(ALGORITHMS) == set(DIFFERENCES)
    assert all(name == row.name for name, row in ALGORITHMS.items())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_are_those_worked_out_by_hand(name: str) -> None:
    expected = torch.tensor(DIFFERENCES[name]) / torch.tensor(SPREADS[name]).unsqueeze(1)
    torch.testing.assert_close(product(name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_normalization_can_be_chosen(name: str) -> None:
    difference = torch.tensor(DIFFERENCES[name])
    torch.testing.assert_close(product(name, "none"), difference)
    spread = statistics.pstdev(difference.flatten().tolist())
    torch.testing.assert_close(product(name, "std"), difference / spread, rtol=1e-5, atol=1e-5)


COMPARING = [name for name in ALGORITHMS if name != "reinforce_plain"]
WITHIN_A_GROUP = [name for name, row in ALGORITHMS.items() if row.needs_group]
# Means of many of these are rounded in float32, 1.0 aside.
VALUES = [0.1, 0.35, 1.0, 22.7, -120.35, 612.3, 100000.3, -3e-39, 1e30]


@pytest.mark.parametrize(
    ("name", "normalize"),
    # that one compares rewards with nothing; divided by a deviation of 0, they count for nothing
    [*itertools.product(COMPARING, ["auto", "std", "none"]), ("reinforce_plain", "std")],
)
def test_equal_rewards_give_no_advantage(name: str, normalize: str) -> None:
    for value in VALUES:
        for groups, samples in ((1, 2), (1, 21), (3, 9), (5, 18), (32, 7), (32, 22)):
            rewards = [[value] * samples] * groups
            found = product(name, normalize, rewards, [str(index) for index in range(groups)])
            assert found.shape == (groups, samples)
            assert found.count_nonzero() == 0, (value, groups, samples)


@pytest.mark.parametrize("normalize", ["auto", "std", "none"])
@pytest.mark.parametrize("name", WITHIN_A_GROUP)
def test_a_group_of_equal_rewards_has_none_beside_others(name: str, normalize: str) -> None:
    for value in VALUES:
        rewards = [[value] * 21, torch.rand(21).tolist()]
        found = product(name, normalize, rewards)
        assert found[0].count_nonzero() == 0, value
        assert found[1].count_nonzero() > 0


@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    groups=st.integers(1, 40),
    samples=st.integers(2, 40),
    name=st.sampled_from(COMPARING),
    normalize=st.sampled_from(["auto", "std", "none"]),
)
def test_whatever_equal_rewards_are(
    value: float, groups: int, samples: int, name: str, normalize: str
) -> None:
    prompts = [str(index) for index in range(groups)]
    assert product(name, normalize, [[value] * samples] * groups, prompts).count_nonzero() == 0


def test_a_history_of_equal_rewards_gives_none() -> None:
    tracker = PromptStatistics()
    for value in VALUES:
        for _ in range(4):
            rewards = torch.full((2, 11), value)
            difference, scale = advantages(ALGORITHMS["ppo"], rewards, [f"{value} a", f"{value} b"], tracker)
            assert (difference * scale).count_nonzero() == 0, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_numbers_deviate_by_nothing(dtype: torch.dtype) -> None:
    for value in VALUES:
        for count in range(2, 40):
            values = torch.full((count,), value, dtype=dtype)
            assert deviations(values).count_nonzero() == 0, (value, count)
            assert spread(values) == 0, (value, count)


@pytest.mark.parametrize("name", COMPARING)
def test_a_large_offset_changes_little(name: str) -> None:
    """Differences of 1/64, which float32 holds exactly beside 100,000."""
    steps = torch.randint(0, 9, (2, 12)) / 64
    steps[:, 0], steps[:, 1] = 0, 1 / 8
    expected = product(name, rewards=steps.tolist())
    torch.testing.assert_close(product(name, rewards=(steps + 1e5).tolist()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "needs_group"), [("loop", True), ("rloo", True), ("grpo", True), ("ppo", False)]
)
def test_only_comparisons_within_a_group_need_one(name: str, needs_group: bool) -> None:
    assert ALGORITHMS[name].needs_group is needs_group


def test_unclipped_algorithms_use_samples_once() -> None:
    assert {name for name, row in ALGORITHMS.items() if row.single_epoch} == {
        "rloo",
        "reinforce",
        "reinforce_plain",
    }


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["algorithm.name=loop", "algorithm.samples_per_prompt=1"], "algorithm.samples_per_prompt: found 1"),
        (["algorithm.name=rloo", "algorithm.samples_per_prompt=1"], "algorithm.samples_per_prompt: found 1"),
        (["algorithm.name=grpo", "algorithm.samples_per_prompt=1"], "algorithm.samples_per_prompt: found 1"),
        (["algorithm.name=rloo", "train.inner_epochs=2"], "train.inner_epochs: found 2"),
        (["algorithm.name=reinforce", "train.inner_epochs=2"], "train.inner_epochs: found 2"),
        (["algorithm.name=reinforce", "algorithm.clip_range=0.2"], "algorithm.clip_range: found 0.2"),
        (["algorithm.clip_range=1.0"], "algorithm.clip_range: found 1.0"),
    ],
)
def test_unusable_combination_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config("model: {pretrained: embedded}", overrides)


@pytest.mark.parametrize("name", ["ppo", "reinforce", "reinforce_plain"])
def test_one_sample_a_prompt_is_enough_without_groups(name: str) -> None:
    config = parse_config(
        "model: {pretrained: embedded}", [f"algorithm.name={name}", "algorithm.samples_per_prompt=1"]
    )
    assert config.algorithm.samples_per_prompt == 1


def ddpo_statistics(
    batches: list[tuple[list[str], np.ndarray]], buffer_size: int, min_count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """DDPO's tracker as its paper describes it: per prompt where there is enough, else over the batch."""
    seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))
    results = []
    for prompts, rewards in batches:
        names = np.repeat(prompts, rewards.shape[1])
        flat = rewards.flatten()
        for name in dict.fromkeys(prompts):
            seen[name].extend(flat[names == name])
        enough = [np.array(seen[n]) if len(seen[n]) >= min_count else flat for n in prompts]
        results.append((np.array([e.mean() for e in enough]), np.array([e.std() for e in enough])))
    return results


@given(data=st.data(), buffer_size=st.integers(1, 9), min_count=st.integers(1, 6), samples=st.integers(1, 4))
def test_prompt_statistics_are_ddpos(
    data: st.DataObject, buffer_size: int, min_count: int, samples: int
) -> None:
    names = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)
    batches = []
    for prompts in data.draw(st.lists(names, min_size=1, max_size=6)):
        values = st.lists(st.floats(-5, 5, width=32), min_size=samples, max_size=samples)
        batches.append((prompts, np.array([data.draw(values) for _ in prompts])))
    tracker = PromptStatistics(buffer_size, min_count)
    for (prompts, rewards), (mean, std) in zip(
        batches, ddpo_statistics(batches, buffer_size, min_count), strict=True
    ):
        found_mean, found_std = tracker.update(prompts, torch.tensor(rewards, dtype=torch.float32))
        assert found_mean.shape == found_std.shape == (len(prompts), 1)
        np.testing.assert_allclose(found_mean.squeeze(1), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found_std.squeeze(1), std, rtol=1e-5, atol=1e-6)


def test_ppo_divides_by_the_prompts_own_spread() -> None:
    tracker = PromptStatistics(min_count=3)
    difference, scale = advantages(ALGORITHMS["ppo"], torch.tensor(REWARDS), PROMPTS, tracker)
    means, spreads = ([f(row) for row in REWARDS] for f in (statistics.fmean, statistics.pstdev))
    torch.testing.assert_close(difference, torch.tensor(REWARDS) - torch.tensor(means).unsqueeze(1))
    torch.testing.assert_close(scale, 1 / (torch.tensor(spreads).unsqueeze(1) + EPSILON))


def test_prompt_statistics_survive_json() -> None:
    tracker = PromptStatistics(min_count=4)
    tracker.update(PROMPTS, torch.rand(2, 3))
    restored = PromptStatistics(min_count=4)
    restored.update(["c"], torch.rand(1, 3))
    restored.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    more = torch.rand(2, 3)
    for found, expected in zip(restored.update(PROMPTS, more), tracker.update(PROMPTS, more), strict=True):
        assert torch.equal(found, expected)
    assert restored.state_dict() == tracker.state_dict()
