"""A reward that runs out of a GPU's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import loopfast.rewards.fitting as fitting
from loopfast.config import Config
from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.errors import LoopfastError, RewardError
from loopfast.prompts import Prompt
from loopfast.rewards import RewardMemoryError, RewardSet, RewardTerm
from loopfast.rewards.base import CountError
from loopfast.rewards.models.pretrained import Placement, PretrainedReward
from loopfast.run.folder import RunFolder
from loopfast.training.microbatch import Microbatches
from loopfast.training.scoring import Scoring

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use. See the documentation"
)
SHORTAGE = (
    r"\(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    r"free\)"
)
PROMPTS = [f"prompt {index}" for index in range(5)]


def images(count: int = 5) -> Tensor:
    return torch.linspace(0, 1, count).view(count, 1, 1, 1).expand(count, 3, 4, 4)


class Brightness:
    """Scores images by their mean, where ``room`` of them fit into memory."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room, self.calls = room, []  # type: ignore[var-annotated]
        self._error = error or torch.OutOfMemoryError(OUT_OF_MEMORY)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        assert len(images) == len(prompts) == len(metadata)
        self.calls.append(len(images))
        if len(images) > self.room:
            raise self._error
        return images.mean((1, 2, 3))


def pretrained(score: Brightness, batch_size: int = 8) -> PretrainedReward:
    place = Placement("bright", torch.device("cpu"), torch.float32, batch_size)
    return PretrainedReward(place, lambda: score)


def terms(reward: Any) -> list[RewardTerm]:
    return [RewardTerm("mine", reward)]


@pytest.fixture(autouse=True)
def freed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(fitting, "free_cached_memory", lambda: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(OUT_OF_MEMORY), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_a_models_calls_halve_and_stay_so(
    error: Exception, freed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    score = Brightness(2, error)
    rewards = RewardSet(terms(pretrained(score)))
    with caplog.at_level(logging.WARNING):
        found = rewards.score(images(), PROMPTS).total
    assert found.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert score.calls == [8, 4, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"reward 'bright': {size} images per call do not fit into the memory of cpu; going on with {size // 2}"
        for size in (8, 4)
    ]
    assert len(freed) == 2
    assert torch.equal(rewards.score(images(), PROMPTS).total, found)
    assert score.calls[5:] == [2, 2, 2]


def test_a_model_that_cannot_take_one_image_says_what_makes_room() -> None:
    score = Brightness(0)
    expected = (
        rf"reward 'bright' ran out of memory on cpu in a call with 1 image\(s\) {SHORTAGE}; its options dtype=float16 "
        "and a smaller batch_size, the reward on another device, a smaller rollout.microbatch"
    )
    # a call that failed as a whole is not tried with fewer images
    with pytest.raises(RewardMemoryError, match=expected) as caught:
        RewardSet(terms(pretrained(score, 4))).score(images(), PROMPTS)
    assert score.calls == [4, 2, 1]
    assert not isinstance(caught.value, RewardError)
    # the tensors of the failed call are free
    assert caught.value.__context__ is None


def test_weights_that_do_not_fit_are_no_traceback() -> None:
    def load() -> Any:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    reward = PretrainedReward(Placement("bright", torch.device("cpu"), torch.float32, 4), load)
    with pytest.raises(RewardMemoryError, match=f"its weights do not fit into the memory of cpu {SHORTAGE}"):
        reward.load()


def test_another_error_of_a_model_is_the_rewards() -> None:
    score = Brightness(0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RewardError, match="'mine' raised RuntimeError: CUDA error: an illegal memory access"):
        RewardSet(terms(pretrained(score))).score(images(), PROMPTS)
    assert score.calls == [8]


def test_a_reward_of_the_users_own_is_called_with_fewer_images() -> None:
    score = Brightness(2)
    rewards = RewardSet(terms(score))
    assert rewards.score(images(), PROMPTS).total.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert score.calls == [5, 2, 2, 1]
    rewards.score(images(3), PROMPTS[:3])
    assert score.calls[4:] == [2, 1]
    expected = rf"reward 'mine' ran out of memory on cpu in a call with 1 image\(s\) {SHORTAGE}"
    with pytest.raises(RewardMemoryError, match=expected):
        RewardSet(terms(Brightness(0))).score(images(), PROMPTS)


def test_a_reward_that_may_compare_images_is_not() -> None:
    score = Brightness(2)
    with pytest.raises(
        RewardMemoryError, match=r"a call with 5 image\(s\) .* rollout.reward_worker other than none"
    ):
        RewardSet(terms(score), full_batch=True).score(images(), PROMPTS)
    assert score.calls == [5]
    # what a model gives does not depend on the other images
    assert RewardSet(terms(pretrained(Brightness(2))), full_batch=True).score(images(), PROMPTS).total[4] == 1


def test_what_is_wrong_in_a_later_call_has_its_place_in_the_batch() -> None:
    def failing(how: str) -> RewardSet:
        def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
            if len(prompts) > 2:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            if "prompt 3" not in prompts:
                return images.mean((1, 2, 3))
            if how == "raises":
                raise ZeroDivisionError
            return {"nan": [1.0, float("nan")], "length": [1.0], "count": None}[how]

        return RewardSet(terms(reward))

    for how, positions in (("raises", (2, 3)), ("nan", (3,)), ("length", (2, 3)), ("count", (2, 3))):
        with pytest.raises(RewardError) as caught:
            failing(how).score(images(), PROMPTS)
        assert caught.value.images_index == positions, how
        # a number that is wrong is a prompt's; all else is the call's
        assert ("'prompt 3'" in str(caught.value)) == (how == "nan")
    for how, missing in (("nan", [3]), ("length", [2, 3])):
        scores = failing(how).score(images(), PROMPTS, keep_bad=True)
        assert scores.total.isnan().nonzero().flatten().tolist() == missing
        assert list(scores.problems) == ["mine"]


def test_a_wrong_number_that_the_reward_itself_was_given_is_still_a_problem() -> None:
    def reward(*_: Any) -> Any:
        raise CountError("the server gave 1 score(s)")

    scores = RewardSet(terms(reward)).score(images(), PROMPTS, keep_bad=True)
    assert scores.total.isnan().all()
    assert "the server gave 1 score(s)" in scores.problems["mine"]


class TwoProcesses(World):
    """A group whose other process has the failure ``told``."""

    def __init__(self, told: RewardMemoryError | None = None) -> None:
        super().__init__(LaunchEnvironment(rank=1, size=2))
        self._told = told

    def gather_texts(self, text: str) -> list[str]:
        return ["" if self._told is None else str(self._told), text]

    def any(self, flag: bool) -> bool:
        return flag or self._told is not None


@pytest.fixture
def judge(small_config: Callable[..., Config]) -> Iterator[Callable[..., Scoring]]:
    made = []

    def make(reward: Any, world: World | None = None, *overrides: str) -> Scoring:
        config = small_config("reward=[{name: '<mine>', label: mine}]", *overrides)
        given = {"<mine>": reward}
        made.append(
            Scoring(
                config.reward,
                config.rollout,
                world or SINGLE_PROCESS,
                RunFolder(config),
                lambda text: None,
                functions=given,
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


@contextmanager
def untimed() -> Iterator[None]:
    yield


@pytest.mark.parametrize("worker", ["inline", "thread", "none"])
def test_the_sampling_is_not_made_smaller_for_a_rewards_sake(
    worker: Any, judge: Callable[..., Scoring]
) -> None:
    microbatches = Microbatches("auto", "auto", 64, lambda text: None)
    judging = judge(Brightness(0), None, f"rollout.reward_worker={worker}")

    def attempt(rows: int) -> Any:
        with (
            judging.errors_on_all_ranks(),
            judging.scorer(worker, lambda latents: latents, untimed) as scorer,
        ):
            scorer.submit(images(), [Prompt(text) for text in PROMPTS])
            return scorer.result()

    with pytest.raises(
        RewardMemoryError, match="iteration 0: reward 'mine' ran out of memory on cpu"
    ) as caught:
        microbatches.with_oom_fallback("rollout", attempt)
    assert microbatches.rollout == 64
    assert not caught.value.on_all_ranks
    assert not (judging._folder.path / "failures").exists()


def test_processes_end_together_with_the_same_error(judge: Callable[..., Scoring]) -> None:
    prompts = [Prompt(text) for text in PROMPTS]
    short = judge(Brightness(0), TwoProcesses())
    with (
        pytest.raises(RewardMemoryError, match="reward 'mine' ran out of memory") as caught,
        short.errors_on_all_ranks(),
    ):
        # the other process waits for this one's model calls: they go on
        assert short.score(images(), prompts).total.isnan().all()
    assert caught.value.on_all_ranks
    other = judge(Brightness(9), TwoProcesses(RewardMemoryError("reward 'mine' ran out of memory on cuda:1")))
    with pytest.raises(RewardMemoryError, match="on cuda:1"), other.errors_on_all_ranks():
        other.score(images(), prompts)
    assert issubclass(RewardMemoryError, LoopfastError)
