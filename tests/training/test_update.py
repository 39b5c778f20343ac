from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.algorithms import PromptStatistics
from loopfast.config import AlgorithmConfig, TrainConfig
from loopfast.engines import LocalEngine
from loopfast.errors import NonFiniteError
from loopfast.rollout import Sampler
from loopfast.rollout.trajectories import Trajectories
from loopfast.schedules import TransitionSchedule
from loopfast.training.loss import PolicyLoss, compare
from loopfast.training.probe import rehearse
from loopfast.training.replay import Replay
from loopfast.training.update import Screening, UpdateStatistics, screen, update

GROUPS, SAMPLES, STEPS, SHAPE = 2, 3, 3, (2, 2)
ROWS = GROUPS * SAMPLES
REWARDS = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
LEAVE_ONE_OUT = torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0], dtype=torch.float64)


class ToyPolicy:
    """One weight matrix on the latent, one on the prompt, in float64."""

    latent_shape = SHAPE
    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(0.3 * torch.randn(4, 4, dtype=torch.float64))
        self.prompt = torch.nn.Parameter(0.3 * torch.randn(4, dtype=torch.float64))
        self._initial = [self.weight.detach().clone(), self.prompt.detach().clone()]
        self._inside_reference = False
        self.batches: list[int] = []
        self.outputs: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.denoiser = torch.nn.ParameterDict(self.trainable())

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight, "prompt": self.prompt}

    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        self.batches.append(len(sample))
        weight, prompt = self._initial if self._inside_reference else (self.weight, self.prompt)
        plain = (sample.flatten(1) @ weight + timestep[:, None] / 10).view_as(sample)
        told = plain + (conditioning["text"][:, None] * prompt).view_as(sample)
        self.outputs.append(told)
        if told.requires_grad:
            told.register_hook(self.gradients.append)
        return told, None if guidance_scale == 1.0 else plain

    def forget(self) -> None:
        for record in (self.batches, self.outputs, self.gradients):
            record.clear()

    @contextmanager
    def reference(self) -> Any:
        self._inside_reference = True
        yield
        self._inside_reference = False


class Gradients:
    """An engine that keeps its gradients and takes no step."""

    learning_rate = 0.5

    def __init__(self) -> None:
        self.updates = self.discarded = 0

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()

    def discard(self) -> None:
        self.discarded += 1

    def update(self) -> float:
        self.updates += 1
        return 2.5


class Case:
    """Trajectories of a policy, and the policy after its weights have moved on."""

    def __init__(self, *, guidance_scale: float = 1.0, reduction: str = "sum", moved: float = 0.05) -> None:
        self.policy = ToyPolicy()
        table = torch.tensor([[1.1, -0.2, 0.5], [0.9, 0.4, 0.7], [1.0, 0.3, 0.4]], dtype=torch.float64)
        schedule = TransitionSchedule(torch.tensor([9, 5, 1]), table, table, (table[:, 1] / table[:, 2]) ** 2)
        policy: Any = self.policy
        self.sampler = Sampler(policy, schedule, guidance_scale, reduction, ROWS)
        self.text = torch.randn(GROUPS, dtype=torch.float64)
        self.prompts = torch.arange(GROUPS).repeat_interleave(SAMPLES)
        sampled = self.sampler.sample({"text": self.text}, self.prompts, torch.arange(ROWS))
        self.trajectories = Trajectories(sampled.latents, sampled.logprob.double())
        with torch.no_grad():
            for parameter in self.policy.trainable().values():
                parameter += moved * torch.randn_like(parameter)
        order = torch.randperm(ROWS * STEPS)[:11]
        self.rows, self.steps = order % ROWS, order // ROWS

    def replay(self, algorithm: AlgorithmConfig, rewards: Tensor = REWARDS) -> Replay:
        advantages = compare(algorithm, rewards, ["a", "b"], PromptStatistics(), torch.device("cpu"))
        return Replay(
            self.sampler,
            PolicyLoss(algorithm, advantages),
            self.trajectories,
            {"text": self.text},
            self.prompts,
        )

    def screen(
        self, algorithm: AlgorithmConfig, microbatch: int = 11, rewards: Tensor = REWARDS
    ) -> Screening:
        self.policy.forget()
        replay = self.replay(algorithm, rewards)
        return screen(replay, (self.rows, self.steps), microbatch=microbatch)

    def update(
        self,
        algorithm: AlgorithmConfig,
        microbatch: int = 4,
        rewards: Tensor = REWARDS,
        engine: Any = None,
        **options: Any,
    ) -> UpdateStatistics:
        self.policy.forget()
        for parameter in self.policy.trainable().values():
            parameter.grad = None
        done = update(
            self.replay(algorithm, rewards),
            gradients := engine or Gradients(),
            (self.rows, self.steps),
            microbatch=microbatch,
            **options,
        )
        assert engine is not None or gradients.updates == 1
        return done

    def gradients(self) -> list[Tensor]:
        found = [parameter.grad for parameter in self.policy.trainable().values()]
        assert all(gradient is not None for gradient in found)
        return [gradient.clone() for gradient in found if gradient is not None]

    def plain(
        self, advantage: Tensor, clip_range: float | None, kl_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ratios and gradients by autograd of the textbook formula, a pair at a time."""
        g, mean = self.sampler.guidance_scale, self.sampler.reduction == "mean"
        losses, ratios = [], []
        for row, step in zip(self.rows.tolist(), self.steps.tolist(), strict=True):
            a, b, sigma = self.sampler.schedule.table64[step]
            x, y = self.trajectories.latents[step, row], self.trajectories.latents[step + 1, row]

            def output(x: Tensor = x, row: int = row, step: int = step) -> Tensor:
                text = {"text": self.text[self.prompts[row]].view(1)}
                time = self.sampler.schedule.timesteps[step].view(1)
                told, plain = self.policy.predict(x[None], time, text, g)
                return (told if plain is None else plain + g * (told - plain))[0]

            density = torch.distributions.Normal(a * x + b * output(), sigma).log_prob(y)
            ratio = torch.exp(
                (density.mean() if mean else density.sum()) - self.trajectories.logprob[step, row]
            )
            loss = -advantage[row] * ratio
            if clip_range is not None:
                loss = torch.maximum(loss, -advantage[row] * ratio.clamp(1 - clip_range, 1 + clip_range))
            if kl_weight:
                with torch.no_grad(), self.policy.reference():
                    before = output()
                shift = 0.5 * (b * (output() - before) / sigma) ** 2
                loss = loss + kl_weight * (shift.mean() if mean else shift.sum())
            losses.append(loss)
            ratios.append(ratio)
        total = torch.stack(losses).mean()
        return total, torch.stack(ratios), torch.autograd.grad(total, self.policy.trainable().values())


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
        replay, pairs = case.replay(config("loop")), (case.rows, case.steps)
        return update(replay, engine, pairs, microbatch=rows, before_step=shown.append)

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


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_rehearsal_calls_as_an_update_does_and_changes_nothing(with_reference: bool) -> None:
    case = Case(guidance_scale=2.0)
    case.policy.batches.clear()
    engine = LocalEngine(case.policy, TrainConfig())  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in case.policy.trainable().values()]
    backward = []
    case.policy.weight.register_post_accumulate_grad_hook(lambda parameter: backward.append(1))
    rehearse(case.sampler, engine, {"text": case.text}, microbatch=5, with_reference=with_reference)
    assert case.policy.batches == [5] * (1 + with_reference)
    assert len(backward) == 1
    for parameter, value in zip(case.policy.trainable().values(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)


def test_a_rehearsal_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    case, sizes, empty = Case(), list[int](), torch.empty

    def noted(*size: int, **options: Any) -> torch.Tensor:
        if options.get("dtype") == torch.uint8:
            sizes.extend(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", noted)
    engine = LocalEngine(case.policy, TrainConfig())  # type: ignore[arg-type]
    rehearse(case.sampler, engine, {"text": case.text}, microbatch=5, with_reference=False, reserve=1000)
    assert sizes == [1000]


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
