from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from loopfast.errors import RewardError, WriteError
from loopfast.evaluation import Evaluation
from loopfast.run.tracking import read_metrics
from loopfast.training.measure import evaluate_policy, record
from loopfast.training.run import Stopped
from loopfast.training.train import iterate
from tests.training.toys import MakeToy, Toy, bad_reward


def evaluated(toy: Toy, rows: int = 2) -> Evaluation:
    return evaluate_policy(toy.run, toy.state, rows)


@pytest.mark.parametrize(
    "overrides",
    [
        ("rollout.stochastic_steps=window:1",),
        ("rollout.dtype=bfloat16",),
        ("rollout.reward_worker=none",),
        ("rollout.microbatch=4",),
    ],
)
def test_what_is_measured_depends_on_no_lever_of_the_rollout(
    overrides: tuple[str, ...], make_toy: MakeToy
) -> None:
    expected, toy = evaluated(make_toy(), 1), make_toy(*overrides)
    assert evaluated(toy, 3).items == expected.items
    assert len({item["reward"] for item in expected.items}) == 2
    # which are what the rollout then goes on with
    assert toy.run.sampler.microbatch == 3


@pytest.mark.parametrize(
    ("sharded", "exact", "sampled"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_copy_is_measured_where_the_weights_are_spread_and_it_computes_the_same(
    sharded: bool, exact: bool, sampled: bool, make_toy: MakeToy
) -> None:
    toy, asked = make_toy("rollout.replica=resident"), list[bool]()
    rollout_copy: Any = toy.run.sampler.rollout_copy

    def gathered(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
        asked.append(True)
        return nullcontext()

    rollout_copy.gathered, rollout_copy.exact, toy.run.engine.sharded = gathered, exact, sharded
    assert evaluated(toy).items == evaluated(make_toy()).items
    assert bool(asked) == sampled
    assert toy.run.sampler.rollout_copy is rollout_copy


def test_the_average_of_the_weights_is_measured_where_one_is_kept(make_toy: MakeToy) -> None:
    toy, plain = make_toy("train.ema_decay=0.9"), make_toy()
    iterate(toy.run, toy.state)
    now = evaluated(toy)
    with toy.run.engine.ema_weights(), torch.no_grad():
        average = toy.weights
    for name, weight in plain.policy.trainable().items():
        assert not torch.equal(toy.weights[name], average[name])
        with torch.no_grad():
            weight.copy_(average[name])
    assert now.items == evaluated(plain).items


def test_images_without_a_score_are_left_out_with_a_warning(make_toy: MakeToy) -> None:
    toy = make_toy(
        bad_reward("star"),
        "rollout.on_bad_reward=drop_group",
        "evaluation={limit_prompts: 4, images_per_prompt: 2}",
    )
    toy.state.iteration = 7
    found = evaluated(toy)
    assert (found.dropped, len(found.items)) == (2, 6)
    [warning] = toy.heard.warnings
    # the evaluation of the iteration that is complete
    assert warning.startswith("iteration 7: 2 of 8 image(s) are left out of the evaluation: reward 'pixel'")


@pytest.mark.parametrize("how", ["nan", "raises"])
@pytest.mark.parametrize("bad", ["error", "drop_group"])
def test_an_evaluation_without_a_score_is_an_error(how: str, bad: str, make_toy: MakeToy) -> None:
    toy = make_toy(bad_reward("a ", how), f"rollout.on_bad_reward={bad}")
    with pytest.raises(RewardError, match="iteration 0: "):
        evaluated(toy)


def test_an_evaluation_can_be_stopped(make_toy: MakeToy) -> None:
    toy = make_toy()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped):
        evaluated(toy)
    assert toy.policy.batches == []


def test_metrics_and_evaluations_are_recorded(make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, shown = make_toy("evaluation.preview_images=1"), list[Any]()
    assert toy.run.tracker is not None
    monkeypatch.setattr(toy.run.tracker, "image", lambda *given: shown.append(given))
    found, folder = evaluated(toy), toy.run.folder.path
    toy.state.iteration, toy.state.images = 5, 30
    record(toy.run, toy.state, found, {"iteration": 5, "images": 30})
    record(toy.run, toy.state, None, {"iteration": 6, "images": 36})
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [5, 6]
    [file] = (folder / "evaluation").glob("*.json")
    written = json.loads(file.read_text("utf-8"))
    assert (file.stem, written["iteration"], written["images"]) == ("iteration-000005", 5, 30)
    assert written["items"] == found.items
    [(tag, iteration, _)] = shown
    assert (tag, iteration) == ("samples", 5)
    assert (folder / "images" / "iteration-000005.png").is_file()


def test_an_evaluation_that_cannot_be_written_is_an_error(make_toy: MakeToy) -> None:
    toy = make_toy()
    (toy.run.folder.path / "evaluation").write_text("in the way")
    with pytest.raises(WriteError, match=f"cannot write in {toy.run.folder.path}: "):
        record(toy.run, toy.state, evaluated(toy), {"iteration": 0})
    assert read_metrics(toy.run.folder.path / "metrics.jsonl") == []
