from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loopfast.seeds import derive, generator, row_seeds
from tests.forks import printed

part = st.integers(0, 2**63 - 1) | st.text(st.characters(codec="ascii", exclude_characters="/"), max_size=8)


@given(st.integers(0, 2**63 - 1), st.lists(part, max_size=3))
def test_a_seed_is_a_function_of_its_path(seed: int, path: list[str | int]) -> None:
    assert 0 <= derive(seed, *path) < 2**63
    assert derive(seed, *path) == derive(seed, *path)
    assert derive(seed, *path) != derive(seed, *path, "more")


def test_a_seed_is_the_same_in_every_process() -> None:
    program = "from loopfast.seeds import derive; print(derive(3, 'prompts', 7))"
    assert int(printed(program)) == derive(3, "prompts", 7)


def test_purposes_do_not_share_random_numbers() -> None:
    names = [(0, "rollout", 1), (0, "rollout", 2), (1, "rollout", 1), (0, "pairs", 1), (0, "rollout", 11)]
    assert len({derive(*name) for name in names}) == len(names)
    draws = [torch.rand(4, generator=generator(*name)) for name in names]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(names)
    assert torch.equal(torch.rand(4, generator=generator(0, "rollout", 1)), draws[0])


def test_a_row_keeps_its_seed_whichever_rows_are_with_it() -> None:
    everything = row_seeds(5, "rollout", 2, [0, 1, 2, 3], 3).view(4, 3)
    assert everything.dtype == torch.int64
    assert everything.unique().numel() == 12
    assert torch.equal(row_seeds(5, "rollout", 2, [3, 1], 3).view(2, 3), everything[[3, 1]])
    assert torch.equal(row_seeds(5, "rollout", 2, [2], 2), everything[2, :2])
    assert not torch.equal(row_seeds(5, "rollout", 3, [2], 2), everything[2, :2])
