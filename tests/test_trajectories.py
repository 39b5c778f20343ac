from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loopfast.trajectories import Trajectories, shuffled_pairs


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
