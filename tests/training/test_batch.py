from __future__ import annotations

import pytest
import torch

from loopfast.training.batch import draw_batch, draw_prompts
from tests.training.toys import PROMPTS, MakeToy


@pytest.mark.parametrize("wanted", [1, 3, 4, 7, 12])
def test_no_prompt_comes_again_before_all_had_their_turn(wanted: int, make_toy: MakeToy) -> None:
    run = make_toy(f"rollout.prompts_per_iteration={wanted}").run
    drawn = [[prompt.text for prompt in draw_prompts(run, iteration)] for iteration in range(8)]
    for texts in drawn:
        assert len(texts) == wanted
        turns = [texts[start : start + len(PROMPTS)] for start in range(0, wanted, len(PROMPTS))]
        assert all(len(set(turn)) == len(turn) for turn in turns)
    assert {text for texts in drawn for text in texts} == set(PROMPTS)
    assert len(set(map(tuple, drawn))) > 1


def test_a_batch_is_a_function_of_the_seed_and_the_iteration(make_toy: MakeToy) -> None:
    run, again, other = make_toy().run, make_toy().run, make_toy("run.seed=1").run
    seeds: list[int] = []
    for iteration in range(3):
        batch, same, another = (draw_batch(each, iteration) for each in (run, again, other))
        assert batch.prompts == same.prompts
        assert torch.equal(batch.seeds, same.seeds)
        seeds += [*batch.seeds.tolist(), *another.seeds.tolist()]
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 6


def test_the_samples_of_a_prompt_lie_side_by_side(make_toy: MakeToy) -> None:
    toy = make_toy("algorithm.samples_per_prompt=3")
    batch = draw_batch(toy.run, 0)
    assert batch.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batch.texts == [prompt.text for prompt in batch.prompts]
    assert torch.equal(batch.conditioning["text"], toy.policy.encode(batch.texts)["text"])
    assert len(batch.seeds) == 9


def test_encoding_is_a_part_of_the_rollout(make_toy: MakeToy) -> None:
    run = make_toy().run
    run.meter.start()
    draw_batch(run, 0)
    assert list(run.meter.stop().phases) == ["rollout"]
