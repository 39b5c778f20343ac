from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.evaluation.draw import draw
from loopfast.prompts import Prompt

PROMPTS = [Prompt(text) for text in ("a", "a", "b", "a", "b")]


class Drawer:
    """Stands in for a sampler; an image is its text's position among those encoded, and its seed."""

    def __init__(self, microbatch: int = 3) -> None:
        self.microbatch = microbatch
        self.encoded: list[list[str]] = []
        self.policy = SimpleNamespace(encode=self.encode)

    def encode(self, texts: list[str]) -> list[str]:
        self.encoded.append(texts)
        return texts

    def sample(self, texts: list[str], prompt_index: Tensor, seeds: Tensor) -> Any:
        return SimpleNamespace(
            final=[
                (texts[index], seed)
                for index, seed in zip(prompt_index.tolist(), seeds.tolist(), strict=True)
            ]
        )

    def decode(self, latents: Any) -> Any:
        return latents


def drawn(microbatch: int, world: World = SINGLE_PROCESS) -> tuple[list[list[str]], list[tuple[slice, Any]]]:
    sampler: Any = Drawer(microbatch)
    found: list[tuple[slice, Any]] = list(draw(sampler, PROMPTS, torch.arange(10, 15), world=world))
    return sampler.encoded, found


def test_a_microbatch_encodes_each_of_its_texts_once() -> None:
    encoded, found = drawn(3)
    assert encoded == [["a", "b"], ["a", "b"]]
    assert found == [
        (slice(0, 3), [("a", 10), ("a", 11), ("b", 12)]),
        (slice(3, 5), [("a", 13), ("b", 14)]),
    ]


def test_a_process_draws_its_own_images_in_as_many_calls_as_the_others() -> None:
    first, second = (World(LaunchEnvironment(rank, 2)) for rank in (0, 1))
    encoded, found = drawn(2, first)
    assert encoded == [["a"], ["a"]]
    assert found == [(slice(0, 2), [("a", 10), ("a", 11)]), (slice(2, 2), [("a", 10)])]
    assert [rows for rows, _ in drawn(2, second)[1]] == [slice(2, 4), slice(4, 5)]


def test_between_is_called_before_each_microbatch() -> None:
    sampler: Any = Drawer()
    asked: list[int] = []
    images = draw(sampler, PROMPTS, torch.arange(5), between=lambda: asked.append(len(sampler.encoded)))
    assert len(list(images)) == 2
    assert asked == [0, 1]
