from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.profiling import Meter
from loopfast.prompts import Prompt
from loopfast.rewards import RewardThread, Scores
from loopfast.training.scorer import AtTheEnd, Inline, Scorer, Threaded

PROMPTS = [Prompt(text) for text in ("a", "bb", "ccc", "dddd", "eeeee")]
LATENTS = torch.arange(5.0).view(5, 1)
PARTS = (slice(0, 2), slice(2, 4), slice(4, 5))


class Judge:
    """A reward that notes what it is asked, and where; a patient one first waits until it is waited for."""

    def __init__(self, fails_at: str = "", *, patient: bool = False) -> None:
        self.fails_at, self.patient = fails_at, patient
        self.calls: list[list[str]] = []
        self.waited_for: list[bool] = []
        self.decoded: list[int] = []
        self.threads: set[str] = set()
        self._waiting = threading.Event()

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        return 10 * latents

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        if self.patient:
            self.waited_for.append(self._waiting.wait(5.0))
        self.calls.append([prompt.text for prompt in prompts])
        self.threads.add(threading.current_thread().name)
        if self.fails_at in self.calls[-1]:
            raise ZeroDivisionError(self.fails_at)
        lengths = torch.tensor([float(len(prompt.text)) for prompt in prompts])
        return Scores(images[:, 0] + lengths, {"image": images[:, 0], "length": lengths})

    @contextmanager
    def clock(self) -> Iterator[None]:
        self._waiting.set()
        yield
        self._waiting.clear()


@contextmanager
def scorer(kind: str, judge: Judge) -> Iterator[Scorer]:
    given: Any = (judge.score, judge.decode, judge.clock)
    if kind != "beside":
        yield {"inline": Inline, "at the end": AtTheEnd}[kind](*given)
        return
    with closing(RewardThread(judge.score)) as thread, thread.batch():
        yield Threaded(thread, *given[1:])


KINDS = {"inline": 3, "beside": 3, "at the end": 1}
each_kind = pytest.mark.parametrize("kind", KINDS)


def scored(kind: str, judge: Judge) -> Scores:
    with scorer(kind, judge) as used:
        for part in PARTS:
            used.submit(LATENTS[part], PROMPTS[part])
        return used.result()


@each_kind
def test_scores_are_the_same_in_the_order_of_the_images(kind: str) -> None:
    found = scored(kind, judge := Judge())
    lengths = torch.arange(1.0, 6.0)
    assert torch.equal(found.total, 10 * LATENTS[:, 0] + lengths)
    assert torch.equal(found.parts["image"], 10 * LATENTS[:, 0])
    assert torch.equal(found.parts["length"], lengths)
    # only at the end is a reward given all that it may compare
    assert len(judge.calls) == len(judge.decoded) == KINDS[kind]
    assert [text for call in judge.calls for text in call] == [prompt.text for prompt in PROMPTS]
    assert judge.threads == {"loopfast-reward" if kind == "beside" else threading.current_thread().name}


@each_kind
def test_a_reward_is_timed_while_it_is_waited_for(kind: str) -> None:
    judge = Judge(patient=True)
    with scorer(kind, judge) as used:
        used.submit(LATENTS, PROMPTS)
        assert len(judge.calls) == (kind == "inline")
        used.result()
    assert judge.waited_for == [True]


def test_images_are_handed_over_in_the_rewards_time() -> None:
    meter = Meter()
    meter.start()
    with meter.phase("rollout"), scorer("beside", Judge()) as used:
        used.submit(LATENTS, PROMPTS)
    assert sorted(meter.stop().phases) == ["reward", "rollout"]


@each_kind
def test_an_error_of_a_reward_is_raised_at_the_latest_with_the_result(kind: str) -> None:
    with pytest.raises(ZeroDivisionError, match="ccc"):
        scored(kind, Judge(fails_at="ccc"))
