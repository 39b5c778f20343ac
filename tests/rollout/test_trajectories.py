from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopfast.rollout.trajectories import Trajectories
from loopfast.training.pairs import shuffled_pairs


def test_pairs_are_neighboring_latents() -> None:
    latents = torch.arange(4 * 3 * 2).view(4, 3, 2).float()
    trajectories = Trajectories(latents, torch.arange(9).view(3, 3).float())
    assert (trajectories.steps, trajectories.count) == (3, 3)
    assert torch.equal(trajectories.final, latents[3])
    rows, steps = torch.tensor([2, 0, 2]), torch.tensor([0, 2, 1])
    sample, prev_sample, logprob = trajectories.pairs(rows, steps)
    for index, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
        assert torch.equal(sample[index], latents[step, row])
        assert torch.equal(prev_sample[index], latents[step + 1, row])
        assert logprob[index] == trajectories.logprob[step, row]


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
    drawn = data.draw(st.integers(1, len(steps)))
    parts = list(shuffled_pairs(count, steps, 3, seed, 0, 0, drawn))
    sizes = [len(rows) for rows, _ in parts]
    assert sum(sizes) == count * drawn
    assert max(sizes) - min(sizes) <= 1
    rows, of = (torch.cat(index) for index in zip(*parts, strict=True))
    assert rows.bincount(minlength=count).tolist() == [drawn] * count
    assert len(set(zip(rows.tolist(), of.tolist(), strict=True))) == count * drawn
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


def test_latents_in_the_hosts_memory_come_back_to_the_log_probabilities_device() -> None:
    """With the device that holds no data, where shapes and devices alone can be seen."""
    latents = torch.arange(4 * 3 * 2.0).view(4, 3, 2)
    kept = Trajectories(latents, torch.zeros(3, 3, device="meta"))
    assert kept.to_host().latents is latents
    sample, prev_sample, logprob = kept.pairs(torch.tensor([2, 0]), torch.tensor([0, 2]))
    assert {t.device.type for t in (sample, prev_sample, logprob)} == {"meta"}
    assert sample.shape == prev_sample.shape == (2, 2)


@pytest.mark.gpu
def test_latents_in_page_locked_memory_are_those_of_the_device() -> None:
    latents = torch.randn(5, 6, 4, 8, 8, device="cuda").bfloat16()
    here = Trajectories(latents, torch.randn(4, 6, device="cuda"))
    there = here.to_host()
    assert there.latents.is_pinned()
    rows, steps = torch.tensor([5, 0, 3]), torch.tensor([0, 3, 1])
    for found, expected in zip(there.pairs(rows, steps), here.pairs(rows, steps), strict=True):
        assert found.device == expected.device
        assert torch.equal(found, expected)
