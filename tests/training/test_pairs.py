from __future__ import annotations

import math
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopfast.rollout.trajectories import Trajectories
from loopfast.training.pairs import Pairs, shuffled_pairs, update_pairs
from loopfast.training.state import Rollout
from tests.training.toys import MakeToy, Toy


@given(
    count=st.integers(1, 12),
    steps=st.sets(st.integers(0, 9), min_size=1).map(lambda steps: tuple(sorted(steps))),
    updates=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_pair_is_dealt_out_once(count: int, steps: tuple[int, ...], updates: int, seed: int) -> None:
    parts = list(shuffled_pairs(count, steps, updates, seed, 0, 0))
    assert len(parts) == updates
    sizes = [len(rows) for rows, _ in parts]
    assert max(sizes) - min(sizes) <= 1
    dealt = [pair for rows, of in parts for pair in zip(rows.tolist(), of.tolist(), strict=True)]
    assert sorted(dealt) == [(row, step) for row in range(count) for step in steps]


def test_the_order_depends_on_seed_iteration_and_epoch() -> None:
    def order(*key: int) -> list[int]:
        [(rows, steps)] = shuffled_pairs(8, (0, 1, 4), 1, *key)
        return (rows * 10 + steps).tolist()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    orders = [order(*key) for key in keys]
    assert [order(*key) for key in keys] == orders
    assert len(set(map(tuple, orders))) == 4
    assert all(order != sorted(order) for order in orders)


@given(
    count=st.integers(1, 12),
    steps=st.sets(st.integers(0, 9), min_size=2).map(lambda steps: tuple(sorted(steps))),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_each_trajectory_contributes_equally_many_of_its_steps(
    count: int, steps: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    per_trajectory = data.draw(st.integers(1, len(steps)))
    parts = list(shuffled_pairs(count, steps, 3, seed, 0, 0, per_trajectory))
    sizes = [len(rows) for rows, _ in parts]
    assert sum(sizes) == count * per_trajectory
    assert max(sizes) - min(sizes) <= 1
    rows, of = (torch.cat(index) for index in zip(*parts, strict=True))
    assert rows.bincount(minlength=count).tolist() == [per_trajectory] * count
    assert len(set(zip(rows.tolist(), of.tolist(), strict=True))) == count * per_trajectory
    assert set(of.tolist()) <= set(steps)


def test_steps_are_drawn_anew_in_every_pass_and_each_as_often_as_any_other() -> None:
    def passes(*key: int) -> Tensor:
        """How often each of 12 trajectories' 4 steps is drawn."""
        times = torch.zeros(12, 4)
        for rows, steps in shuffled_pairs(12, (0, 1, 2, 3), 2, *key, 2):
            times[rows, steps] += 1
        return times

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({tuple(passes(*key).flatten().tolist()) for key in keys}) == len(keys)
    assert torch.equal(passes(0, 3, 1), passes(0, 3, 1))
    # 400 draws of 1/2 for each pair, 4,800 for each step: standard deviations of 0.025 and 0.007
    share = sum(passes(0, iteration, 0) for iteration in range(400)) / 400
    assert (share - 0.5).abs().max() < 0.1
    assert (share.mean(0) - 0.5).abs().max() < 0.03


def dealt(toy: Toy, rewards: Tensor | None = None) -> list[list[tuple[int, int]]]:
    """The pairs of each update that is left, of three prompts with two images each if nothing else is said."""
    rewards = torch.zeros(3, 2) if rewards is None else rewards
    trajectories = Trajectories(torch.zeros(4, rewards.numel(), 1), torch.zeros(3, rewards.numel()))
    parts: list[Pairs] = update_pairs(
        toy.run, toy.state, Rollout(trajectories, rewards, rewards.isfinite().all(1))
    )
    return [[*zip(rows.tolist(), steps.tolist(), strict=True)] for rows, steps in parts]


def test_every_pass_deals_out_all_pairs_in_another_order(make_toy: MakeToy) -> None:
    toy = make_toy("train.inner_epochs=2")
    parts = dealt(toy)
    assert [len(part) for part in parts] == [6] * 6
    first, second = [*chain(*parts[:3])], [*chain(*parts[3:])]
    assert sorted(first) == sorted(second) == [(row, step) for row in range(6) for step in range(3)]
    assert first != second
    toy.state.iteration = 1
    assert dealt(toy)[0] != parts[0]


@pytest.mark.parametrize("done", [0, 1, 4, 6])
def test_an_iteration_goes_on_with_the_updates_that_are_left(done: int, make_toy: MakeToy) -> None:
    toy = make_toy("train.inner_epochs=2")
    whole = dealt(toy)
    toy.state.updates = [{}] * done
    assert dealt(toy) == whole[done:]


def test_pairs_are_cut_as_if_a_prompt_that_is_left_out_were_not_there(make_toy: MakeToy) -> None:
    toy = make_toy()
    two = dealt(toy, torch.zeros(2, 2))
    # of the prompts left out, one score is a number
    rewards = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [0.0, 0.0]])
    kept = {0: 0, 1: 1, 2: 4, 3: 5}
    assert dealt(toy, rewards) == [[(kept[row], step) for row, step in part] for part in two]


@pytest.mark.parametrize(
    ("override", "each"),
    [("rollout.stochastic_steps=window:2", 2), ("train.step_fraction=0.3", 1), ("train.steps=1:3", 2)],
)
def test_pairs_are_of_the_steps_that_the_iteration_trains_on(
    override: str, each: int, make_toy: MakeToy
) -> None:
    toy = make_toy(override)
    for toy.state.iteration in range(4):
        _, trained = toy.run.steps.for_iteration(0, toy.state.iteration)
        pairs = [*chain(*dealt(toy))]
        assert Counter(row for row, _ in pairs) == dict.fromkeys(range(6), each)
        assert len(set(pairs)) == len(pairs)
        assert {step for _, step in pairs} <= {*trained}
