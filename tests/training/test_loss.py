from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.algorithms import ALGORITHMS, EPSILON, PromptStatistics
from loopfast.config import AlgorithmConfig
from loopfast.training.loss import Advantages, PolicyLoss, compare
from loopfast.training.update_pass import reference_output
from loopfast_kernels import LoopLoss
from tests.training.toys import GROUPS, KEPT, REWARDS, SAMPLES, Case

CPU = torch.device("cpu")


def config(
    name: str, *, clip: float | None = None, normalize: str = "auto", **options: Any
) -> AlgorithmConfig:
    return AlgorithmConfig(name=name, advantage={"clip": clip, "normalize": normalize}, **options)  # type: ignore[arg-type]


def formula(name: str, normalize: str = "auto", history: tuple[list[float], ...] | None = None) -> Tensor:
    """The advantages of `REWARDS`, float64 ``[G, K]``, by what the table of algorithms says in words.

    ``history``: each prompt's rewards, if there are enough; None: those of the batch count.
    """
    row, rewards = ALGORITHMS[name], REWARDS.double()
    seen = [torch.tensor(values).double() for values in history] if history else [rewards.flatten()] * GROUPS
    others = torch.stack(
        [rewards[:, [k for k in range(SAMPLES) if k != own]].mean(1) for own in range(SAMPLES)], 1
    )
    difference = (
        rewards
        - {
            "leave_one_out": others,
            "group_mean": rewards.mean(1, keepdim=True),
            "batch_mean": rewards.mean(),
            "prompt_running_mean": torch.stack([values.mean() for values in seen])[:, None],
            "none": torch.zeros(()),
        }[row.baseline]
    )
    kind = {"auto": row.normalize, "std": "batch_std", "none": "none"}[normalize]
    if kind == "none":
        return difference
    deviation = {
        "batch_std": difference.std(correction=0),
        "group_std": rewards.std(1, correction=0, keepdim=True),
        "prompt_running_std": torch.stack([values.std(correction=0) for values in seen])[:, None],
    }[kind]
    return difference / (deviation + EPSILON)


def compared(algorithm: AlgorithmConfig) -> Advantages:
    return compare(algorithm, REWARDS, KEPT, ["a", "b"], PromptStatistics(), CPU)


@pytest.mark.parametrize("clip", [None, 1.1])
@pytest.mark.parametrize("normalize", ["auto", "std", "none"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_are_those_of_the_formula(name: str, normalize: str, clip: float | None) -> None:
    found = compared(config(name, clip=clip, normalize=normalize))
    expected = formula(name, normalize).flatten()
    if clip is not None:
        assert expected.abs().max() > clip
        expected = expected.clamp(-clip, clip)
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.rewards, REWARDS)
    assert found.values.dtype == found.scale.dtype == torch.float32


def test_a_prompts_history_is_what_its_rewards_are_compared_with() -> None:
    statistics = PromptStatistics(min_count=4)
    statistics.load_state_dict({"a": [4.0, 5.0], "b": [-1.0]})
    found = compare(config("ppo"), REWARDS, KEPT, ["a", "b"], statistics, CPU)
    expected = formula("ppo", history=([4.0, 5.0, 1.0, 2.0, 6.0], [-1.0, 0.0, 0.0, 3.0])).flatten()
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-6)
    assert statistics.state_dict() == {"a": [4.0, 5.0, 1.0, 2.0, 6.0], "b": [-1.0, 0.0, 0.0, 3.0]}


@pytest.mark.parametrize("normalize", ["auto", "std", "none"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_op_compares_by_itself_where_it_can(name: str, normalize: str) -> None:
    assert compared(config(name, normalize=normalize)).fused == (name in ("loop", "rloo"))


def pairs_loss(case: Case, algorithm: AlgorithmConfig, rewards: Tensor = REWARDS) -> LoopLoss:
    """The loss of a case's pairs, as an update works it out in one model call."""
    sampler, rows, steps = case.sampler, case.rows, case.steps
    loss = PolicyLoss(algorithm, compare(algorithm, rewards, KEPT, ["a", "b"], PromptStatistics(), CPU))
    transitions = case.trajectories.pairs(rows, steps)
    given = transitions[0], sampler.schedule.timesteps[steps], {"text": case.text[case.prompts[rows]]}
    reference = reference_output(sampler, *given) if loss.needs_reference else None
    output, unconditional = case.policy.predict(*given, sampler.guidance_scale)
    return loss(sampler, output, unconditional, reference, transitions, rows, steps)


@pytest.mark.parametrize(("reduction", "guidance_scale"), [("sum", 2.0), ("mean", 1.0)])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_is_that_of_the_plain_formula(
    name: str, kl_weight: float, reduction: str, guidance_scale: float
) -> None:
    case, algorithm = (
        Case(guidance_scale=guidance_scale, reduction=reduction, moved=0.3),
        config(name, kl_weight=kl_weight),
    )
    found = pairs_loss(case, algorithm)
    found.loss.backward()
    advantage = formula(name).flatten()
    loss, ratio, gradients = case.plain(advantage, ALGORITHMS[name].clip_range, kl_weight)
    # rewards and advantages are float32
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found.ratio, ratio, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.advantage.double(), advantage[case.rows], rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert (found.kl > 0).all() == (kl_weight > 0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_pairs_have_no_gradient_where_the_clip_or_equal_rewards_take_it(name: str) -> None:
    case = Case(moved=0.4)
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    algorithm = config(name)
    found = pairs_loss(case, algorithm, rewards)
    loss = PolicyLoss(algorithm, compared(algorithm))
    clip_range = ALGORITHMS[name].clip_range
    far = torch.zeros(len(case.rows), dtype=torch.bool)
    if clip_range is not None:
        up, down = found.ratio > 1 + clip_range, found.ratio < 1 - clip_range
        far = ((found.advantage > 0) & up) | ((found.advantage < 0) & down)
        assert far.any()
    assert torch.equal(found.clipped, far)
    without = far | (found.advantage == 0)
    assert torch.equal(loss.zero_gradient(found), without)
    # the others compare a prompt's images with all, or with nothing
    assert without.any() == (name not in ("reinforce", "reinforce_plain"))
    # that of the divergence is there whatever the ratio is
    penalized = PolicyLoss(config(name, kl_weight=0.1), compared(algorithm))
    assert not penalized.zero_gradient(found).any()


@pytest.mark.parametrize(("given", "used"), [(None, 0.2), (0.05, 0.05)])
def test_the_clip_range_is_the_algorithms_where_none_is_given(given: float | None, used: float) -> None:
    algorithm = config("loop", clip_range=given)
    assert PolicyLoss(algorithm, compared(algorithm)).clip_range == used
    case = Case(moved=0.4)
    found = pairs_loss(case, algorithm)
    loss, _, _ = case.plain(formula("loop").flatten(), used, 0.0)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["loop", "grpo"])
def test_an_advantage_is_clipped_within_the_op_and_before_it(name: str) -> None:
    case = Case()
    found = pairs_loss(case, config(name, clip=0.8))
    expected = formula(name).flatten().clamp(-0.8, 0.8)[case.rows]
    torch.testing.assert_close(found.advantage.double(), expected, rtol=1e-5, atol=1e-6)
    assert (expected.abs() == 0.8).any()
