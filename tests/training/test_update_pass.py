from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.config import AlgorithmConfig
from loopfast.training.update_pass import Losses, reference_output
from tests.training.toys import LEAVE_ONE_OUT, Case, Gradients

ALGORITHM = AlgorithmConfig(name="loop", advantage={"normalize": "none", "clip": None})  # type: ignore[arg-type]


def replayed(
    case: Case, microbatch: int = 11, engine: Any = None, count: float = 1, **changes: Any
) -> Losses:
    """The losses of a case's 11 pairs."""
    case.policy.forget()
    algorithm = ALGORITHM.model_copy(update=changes)
    return case.update_pass(algorithm).losses((case.rows, case.steps), microbatch, engine, count)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("microbatch", [1, 3, 11, 64])
def test_losses_are_those_of_the_pairs_in_their_order(microbatch: int, guidance_scale: float) -> None:
    case = Case(moved=0.5, guidance_scale=guidance_scale)
    found = replayed(case, microbatch)
    assert case.policy.batches == [microbatch] * -(-11 // microbatch)
    # without a place for it, no gradient is computed
    assert not any(output.requires_grad for output in case.policy.outputs)
    loss, ratio, _ = case.plain(LEAVE_ONE_OUT, 0.2, 0.0)
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(found.ratio, ratio, rtol=1e-9, atol=1e-12)
    logprob = case.trajectories.logprob[case.steps, case.rows] + ratio.log()
    torch.testing.assert_close(found.logprob, logprob, rtol=1e-9, atol=1e-9)
    positive = LEAVE_ONE_OUT[case.rows] > 0
    far = torch.where(positive, ratio > 1.2, ratio < 0.8)
    assert far.any()
    assert torch.equal(found.clipped, far)
    assert torch.equal(found.zero_gradient, far)
    assert not found.kl.any()


@pytest.mark.parametrize("microbatch", [2, 4, 11])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_gradient_is_the_sum_of_the_pairs_by_the_count(kl_weight: float, microbatch: int) -> None:
    case, engine = Case(), Gradients()
    found = replayed(case, microbatch, engine, 22.0, kl_weight=kl_weight)  # type: ignore[arg-type]
    calls = -(-11 // microbatch)
    assert engine.last == [False] * (calls - 1) + [True]
    assert len(case.policy.batches) == calls * (1 + (kl_weight > 0))
    assert (found.kl > 0).all() == (kl_weight > 0)
    _, _, gradients = case.plain(LEAVE_ONE_OUT, 0.2, kl_weight)
    for gradient, mean in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(gradient, mean * 11 / 22, rtol=1e-9, atol=1e-12)
    assert not found.ratio.requires_grad


def test_a_gradient_of_no_weight_is_there_and_zero() -> None:
    case = Case()
    replayed(case, 4, Gradients(), math.inf)  # type: ignore[arg-type]
    assert not any(gradient.any() for gradient in case.gradients())


@pytest.mark.parametrize(("padding", "rows"), [(None, [8, 8]), (1, [8, 3]), (2, [8, 4]), (16, [8, 8])])
def test_rows_that_fill_a_call_up_count_for_nothing(padding: int | None, rows: list[int]) -> None:
    case = Case()
    whole = replayed(case, 11)
    case.policy.forget()
    found = case.update_pass(ALGORITHM).losses((case.rows, case.steps), 8, padding=padding)
    assert case.policy.batches == rows
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    assert torch.equal(found.ratio, whole.ratio)


def test_trajectories_of_another_type_are_replayed_in_the_policys_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, types = Case(), list[torch.dtype]()
    expected, predict = replayed(case), case.policy.predict

    def noted(sample: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
        types.append(sample.dtype)
        return predict(sample, *args)

    monkeypatch.setattr(case.policy, "predict", noted)
    half = replace(case.trajectories, latents=case.trajectories.latents.float())
    found = replace(case.update_pass(ALGORITHM), trajectories=half).losses((case.rows, case.steps), 11)
    assert types == [torch.float64]
    torch.testing.assert_close(found.ratio, expected.ratio, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_reference_is_the_guided_output_of_the_policy_before_training(guidance_scale: float) -> None:
    case = Case(guidance_scale=guidance_scale)
    sample, timestep, text = (
        torch.randn(5, 2, 2, dtype=torch.float64),
        torch.arange(5),
        {"text": torch.randn(5)},
    )
    found = reference_output(case.sampler, sample.requires_grad_(), timestep, text)
    with torch.no_grad(), case.policy.reference():
        told, plain = case.policy.predict(sample, timestep, text, guidance_scale)
    expected = told if plain is None else plain + guidance_scale * (told - plain)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not found.requires_grad
    with torch.no_grad():
        assert not torch.equal(case.policy.predict(sample, timestep, text)[0], told)
