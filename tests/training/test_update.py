from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from loopfast.config import AlgorithmConfig, TrainConfig
from loopfast.engines import LocalEngine
from loopfast.errors import NonFiniteError
from loopfast.training.update import UpdateStatistics, update
from tests.training.toys import GROUPS, LEAVE_ONE_OUT, REWARDS, SAMPLES, Case, Gradients


def config(name: str, **options: Any) -> AlgorithmConfig:
    advantage = {"normalize": options.pop("normalize", "none"), "clip": options.pop("clip", None)}
    return AlgorithmConfig(name=name, samples_per_prompt=SAMPLES, advantage=advantage, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize(("name", "clip_range"), [("loop", 0.2), ("loop", 0.01), ("rloo", None)])
def test_the_gradient_is_that_of_the_plain_formula(
    name: str, clip_range: float | None, kl_weight: float, reduction: str, guidance_scale: float
) -> None:
    case = Case(guidance_scale=guidance_scale, reduction=reduction)
    done = case.update(config(name, clip_range=clip_range, kl_weight=kl_weight))
    loss, ratio, gradients = case.plain(LEAVE_ONE_OUT, clip_range, kl_weight)
    assert done.loss == pytest.approx(loss.item(), rel=1e-9)
    for found, expected in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert done.ratio_max_deviation == pytest.approx((ratio - 1).abs().max().item(), rel=1e-9)
    assert done.kl == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-9)
    assert done.logprob_change == pytest.approx(ratio.log().abs().mean().item(), rel=1e-9)
    assert (done.kl_reference > 0) == (kl_weight > 0)
    assert (done.grad_norm, done.learning_rate) == (2.5, 0.5)


def test_advantages_given_to_the_op_are_treated_alike() -> None:
    case = Case()
    case.update(config("grpo", clip_range=0.2, normalize="auto", clip=0.8))
    centered = REWARDS.double() - REWARDS.double().mean(1, keepdim=True)
    advantage = (centered / REWARDS.double().std(1, correction=0, keepdim=True)).clamp(-0.8, 0.8).flatten()
    _, _, gradients = case.plain(advantage, 0.2, 0.0)
    for found, expected in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_fused_advantages_are_scaled_and_clipped() -> None:
    case = Case()
    case.update(config("loop", clip_range=0.2, normalize="auto", clip=1.2))
    advantage = (LEAVE_ONE_OUT / LEAVE_ONE_OUT.std(correction=0)).clamp(-1.2, 1.2)
    _, _, gradients = case.plain(advantage, 0.2, 0.0)
    for found, expected in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_clip_takes_the_gradient_of_pairs_that_went_far_enough() -> None:
    case = Case(moved=0.5)
    clipped = case.update(config("loop", clip_range=0.05))
    _, ratio, _ = case.plain(LEAVE_ONE_OUT, None, 0.0)
    advantage = LEAVE_ONE_OUT[case.rows]
    far = ((advantage > 0) & (ratio > 1.05)) | ((advantage < 0) & (ratio < 0.95))
    assert 0 < far.sum() < len(far)
    assert clipped.clip_fraction == pytest.approx(far.double().mean().item())
    outside = ((ratio - 1).abs() > 0.05).double().mean().item()
    assert clipped.ratio_outside_clip == pytest.approx(outside)
    unclipped = case.update(config("rloo"))
    assert (unclipped.clip_fraction, unclipped.ratio_outside_clip) == (0.0, 0.0)
    assert unclipped.loss < clipped.loss


@pytest.mark.parametrize("microbatch", [1, 2, 5, 11, 64])
def test_the_microbatch_changes_nothing_but_the_size_of_calls(microbatch: int) -> None:
    case = Case(guidance_scale=2.0)
    algorithm = config("loop", kl_weight=0.1)
    whole = case.update(algorithm, microbatch=11)
    expected = case.gradients()
    found = case.update(algorithm, microbatch=microbatch)
    calls = math.ceil(11 / microbatch)
    assert case.policy.batches == [microbatch] * (2 * calls)
    for name, value in vars(found).items():
        assert value == pytest.approx(vars(whole)[name], rel=1e-9), name
    for gradient, other in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("padding", "calls"), [(None, [8, 8]), (1, [8, 3]), (2, [8, 4]), (16, [8, 8])])
def test_the_last_call_is_filled_up_as_far_as_asked(padding: int | None, calls: list[int]) -> None:
    case = Case()
    expected = case.update(config("loop"), microbatch=11)
    gradients = case.gradients()
    found = case.update(config("loop"), microbatch=8, padding=padding)
    assert case.policy.batches == calls
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    for gradient, other in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def test_statistics_are_shown_before_the_step_and_can_prevent_it() -> None:
    case = Case()
    shown: list[UpdateStatistics] = []

    def refuse(statistics: UpdateStatistics) -> None:
        shown.append(statistics)
        raise InterruptedError

    engine = Gradients()
    with pytest.raises(InterruptedError):
        case.update(config("loop"), engine=engine, before_step=refuse)
    assert (engine.updates, engine.discarded) == (0, 1)
    assert shown[0].ratio_max_deviation > 0


def test_a_loss_that_is_not_finite_names_its_trajectories() -> None:
    case = Case()
    case.trajectories.latents[2, 4] = math.nan
    case.rows, case.steps = torch.tensor([0, 4, 3, 4]), torch.tensor([0, 1, 2, 0])
    with pytest.raises(NonFiniteError, match="the loss is not finite") as caught:
        case.update(config("loop"), microbatch=3, engine=(engine := Gradients()))
    assert caught.value.rows == (4,)
    assert (engine.updates, engine.discarded) == (0, 1)


def test_a_gradient_that_is_not_finite_names_all_trajectories(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    case.rows, case.steps = torch.tensor([5, 2, 5]), torch.tensor([0, 1, 2])

    def fail(self: Gradients) -> float:
        raise NonFiniteError("the gradient's norm is nan")

    monkeypatch.setattr(Gradients, "update", fail)
    with pytest.raises(NonFiniteError, match="norm is nan") as caught:
        case.update(config("loop"), engine=(engine := Gradients()))
    assert caught.value.rows == (2, 5)
    assert engine.discarded == 1


def test_an_update_that_runs_out_of_memory_leaves_nothing_behind() -> None:
    case = Case(guidance_scale=2.0)
    expected = case.update(config("loop"), microbatch=4)
    gradients = case.gradients()
    engine = LocalEngine(case.policy, TrainConfig())  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in case.policy.trainable().values()]
    predict, calls = case.policy.predict, []

    def limited(*args: Any) -> Any:
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")
        return predict(*args)

    case.policy.predict = limited  # type: ignore[method-assign]

    def attempt(rows: int) -> UpdateStatistics:
        update_pass, pairs = case.update_pass(config("loop")), (case.rows, case.steps)
        return update(update_pass, engine, pairs, microbatch=rows, before_step=shown.append)

    shown: list[UpdateStatistics] = []
    with pytest.raises(torch.OutOfMemoryError):
        attempt(8)
    assert all(parameter.grad is None for parameter in case.policy.trainable().values())
    for parameter, value in zip(case.policy.trainable().values(), before, strict=True):
        assert torch.equal(parameter, value)
    done = attempt(4)
    assert calls == [8, 8, 4, 4, 4]
    assert len(shown) == 1
    assert done.loss == expected.loss
    assert done.grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("name", ["loop", "grpo"])
@pytest.mark.parametrize("microbatch", [1, 3, 16])
def test_a_screened_update_has_the_gradient_of_all_pairs_from_those_that_have_one(
    microbatch: int, name: str, guidance_scale: float
) -> None:
    case = Case(moved=0.3, guidance_scale=guidance_scale)
    algorithm = config(name, clip_range=0.05)
    # a prompt's equal rewards are no advantage over each other
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    whole = case.update(algorithm, rewards=rewards)
    expected = case.gradients()
    screening = case.screen(algorithm, rewards=rewards)
    assert case.policy.batches == [11]
    assert not any(output.requires_grad for output in case.policy.outputs)
    kept = int(screening.kept.sum())
    assert 0 < kept < 11 * (1 - whole.clip_fraction)
    assert whole.zero_gradient == screening.statistics.zero_gradient == pytest.approx(1 - kept / 11)
    done = case.update(algorithm, microbatch, rewards, screening=screening)
    assert case.policy.batches == [microbatch] * math.ceil(kept / microbatch)
    # the rows that pad a call up have no gradient either
    assert sum(int(grad.flatten(1).any(1).sum()) for grad in case.policy.gradients) == kept
    for gradient, other in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)
    assert (whole.screened_out, done.screened_out) == (0.0, pytest.approx(1 - kept / 11))
    for field, value in vars(whole).items():
        if field != "screened_out":
            assert vars(done)[field] == pytest.approx(value, rel=1e-9), field


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_update_without_any_gradient_steps_as_if_it_were_not_screened(weight_decay: float) -> None:
    algorithm, equal = config("loop", clip_range=0.05), torch.ones(GROUPS, SAMPLES)
    results = []
    for screened in (False, True):
        torch.manual_seed(1)
        case = Case()
        settings = TrainConfig(learning_rate=0.1, warmup_updates=0, weight_decay=weight_decay)
        engine = LocalEngine(case.policy, settings)  # type: ignore[arg-type]
        case.update(algorithm, engine=engine)  # moments that a step without a gradient goes on with
        screening = case.screen(algorithm, rewards=equal) if screened else None
        before = case.policy.weight.detach().clone()
        done = case.update(algorithm, 3, equal, engine, screening=screening)
        assert len(case.policy.batches) == (1 if screened else 4)
        assert (done.zero_gradient, done.screened_out, done.grad_norm) == (1.0, float(screened), 0.0)
        assert not torch.equal(case.policy.weight, before)
        tensors, state = engine.state()
        results.append((tensors, state))
    (tensors, state), (others, other_state) = results
    assert state == other_state
    for group in tensors:
        assert tensors[group].keys() == others[group].keys()
        assert all(torch.equal(value, others[group][name]) for name, value in tensors[group].items())


def test_pairs_with_a_penalty_all_have_a_gradient() -> None:
    case = Case(moved=0.5)
    done = case.update(config("loop", clip_range=0.05, kl_weight=0.3))
    assert done.clip_fraction > 0
    assert done.zero_gradient == 0.0


def test_a_screening_that_is_not_finite_names_its_trajectories() -> None:
    case = Case()
    case.trajectories.latents[2, 4] = math.nan
    case.rows, case.steps = torch.tensor([0, 4, 3, 4]), torch.tensor([0, 1, 2, 0])
    with pytest.raises(NonFiniteError, match="the loss is not finite") as caught:
        case.screen(config("loop"), 3)
    assert caught.value.rows == (4,)


def test_a_loss_that_only_calls_with_gradients_make_infinite_stops_a_screened_update() -> None:
    case = Case(moved=0.3)
    algorithm = config("loop", clip_range=0.05)
    screening = case.screen(algorithm)
    row = int(case.rows[screening.kept][0])
    case.trajectories.latents[1, row] = math.nan
    with pytest.raises(NonFiniteError, match="the loss is not finite") as caught:
        case.update(algorithm, screening=screening)
    assert caught.value.rows == (row,)
