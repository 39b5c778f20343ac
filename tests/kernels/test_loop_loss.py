from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopfast_kernels import (
    LoopLoss,
    clipped_loss,
    denoise_step,
    leave_one_out,
    loop_loss,
    transition_logprob,
)
from tests.kernels.accuracy import FLOAT32, ROUNDING, rms


def plain_loss(
    output: Tensor,
    case,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_range: float | None,
    uncond: Tensor | None,
    guidance_scale: float,
    kl_weight: float,
    reduction: str,
) -> Tensor:
    """The objective as it is written; autograd differentiates it."""
    a, b, sigma = (
        column.reshape(-1, *(1,) * (output.dim() - 1)) for column in case.table[case.step].unbind(1)
    )
    guided = output if uncond is None else uncond + guidance_scale * (output - uncond)
    mean = a * case.sample + b * guided
    reference_mean = a * case.sample + b * case.reference_output

    def reduce(values: Tensor) -> Tensor:
        return values.flatten(1).mean(1) if reduction == "mean" else values.flatten(1).sum(1)

    normal = torch.distributions.Normal
    logprob = reduce(normal(mean, sigma).log_prob(case.prev_sample))
    kl = reduce(torch.distributions.kl_divergence(normal(mean, sigma), normal(reference_mean, sigma)))
    ratio = (logprob - old_logprob).clamp(-20, 20).exp()
    loss = -advantage * ratio
    if clip_range is not None:
        loss = torch.maximum(loss, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    return (loss + kl_weight * kl).mean()


@settings(max_examples=25)
@given(
    rows=st.integers(1, 6),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    clip_range=st.none() | st.floats(1e-3, 0.5),
    guidance_scale=st.none() | st.floats(-1, 8),
    kl_weight=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_loss_and_gradients_are_those_of_the_plain_formula(
    make_transition, rows, shape, seed, clip_range, guidance_scale, kl_weight, reduction
):
    case = make_transition(rows, tuple(shape), dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    advantage = torch.randn(rows, generator=generator, dtype=torch.float64)
    old_logprob = plain_old_logprob(case, guidance_scale, reduction)
    old_logprob += 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64)

    def inputs() -> tuple[Tensor, Tensor | None]:
        uncond = None if guidance_scale is None else case.uncond_output.clone().requires_grad_()
        return case.model_output.clone().requires_grad_(), uncond

    scale = 1.0 if guidance_scale is None else guidance_scale
    output, uncond = inputs()
    result = clipped_loss(
        output,
        case.sample,
        case.prev_sample,
        case.table,
        case.step,
        old_logprob,
        advantage,
        clip_range=clip_range,
        uncond_output=uncond,
        guidance_scale=scale,
        reference_output=case.reference_output,
        kl_weight=kl_weight,
        reduction=reduction,
    )
    plain_output, plain_uncond = inputs()
    expected = plain_loss(
        plain_output, case, old_logprob, advantage, clip_range, plain_uncond, scale, kl_weight, reduction
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-9)
    # A loss is rarely the last word: microbatches weight it.
    (result.loss * 0.25).backward()
    (expected * 0.25).backward()
    torch.testing.assert_close(output.grad, plain_output.grad, rtol=1e-9, atol=1e-9)
    if uncond is not None:
        torch.testing.assert_close(uncond.grad, plain_uncond.grad, rtol=1e-9, atol=1e-9)


def check_against_float64(
    each_backend,
    case,
    *,
    samples: int = 3,
    guided: bool = True,
    with_reference: bool = True,
    reduction: str = "mean",
    clip_range: float | None = 0.2,
    loss_scale: float | None = None,
) -> None:
    dtype, rows = case.sample.dtype, len(case.step)
    elements = case.sample[0].numel()
    rewards, trajectory = torch.randn(4, samples), torch.randint(4 * samples, (rows,))
    exact = case.to(torch.float64)
    old_logprob = plain_old_logprob(exact, 2.5 if guided else None, reduction)
    # On both sides of the clip range, and off its edges.
    old_logprob = (old_logprob + torch.tensor([0.05, -0.5, 0.6])[torch.randint(3, (rows,))]).float()

    def run(of, device: str) -> tuple[LoopLoss, tuple[Tensor, ...]]:
        of = of.to(device)
        inputs = [of.model_output.requires_grad_()]
        options = {"reduction": reduction, "clip_range": clip_range, "advantage_clip": 1.5}
        if guided:
            inputs.append(of.uncond_output.requires_grad_())
            options |= {"uncond_output": of.uncond_output, "guidance_scale": 2.5}
        if with_reference:
            options |= {"reference_output": of.reference_output, "kl_weight": 0.1}
        result = loop_loss(
            of.model_output,
            of.sample,
            of.prev_sample,
            of.table,
            of.step,
            old_logprob.to(device),
            rewards.to(device),
            trajectory.to(device),
            advantage_scale=1.3,
            **options,
        )
        scale = rows * (elements if reduction == "mean" else 1) if loss_scale is None else loss_scale
        return result, torch.autograd.grad(result.loss * scale, inputs)

    expected, expected_gradients = run(exact, "cpu")
    with each_backend.active():
        result, gradients = run(case, each_backend.device)
    # A ratio is as exact as the difference of two log-probabilities.
    size = max(1.0, float(expected.logprob.abs().max()))
    assert rms(result.logprob, expected.logprob) < FLOAT32
    assert rms(result.advantage, expected.advantage) < FLOAT32
    assert rms(result.ratio, expected.ratio) < FLOAT32 * size
    assert rms(result.kl, expected.kl) < FLOAT32
    assert rms(result.loss, expected.loss) < 10 * FLOAT32 * size
    assert torch.equal(result.clipped.cpu(), expected.clipped)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        # Rounded as it is made, and again as the backward pass scales it.
        assert rms(gradient, other) < 2 * ROUNDING[dtype] + FLOAT32 * size


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 3, 3), (1000,), (4, 32, 32), (4, 64, 64)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_every_backend_against_float64(make_transition, each_backend, dtype, shape, guided, with_reference):
    each_backend.skip_unless_it_takes(dtype)
    case = make_transition(rows=2, shape=shape, dtype=dtype)
    case.table[case.step[1], 2] = 0.0
    check_against_float64(each_backend, case, guided=guided, with_reference=with_reference)


@pytest.mark.parametrize(("rows", "elements"), [(1, 17_000), (2, 32_768)])
@pytest.mark.usefixtures("poisoned")
def test_every_backend_on_rows_too_large_for_one_program(make_transition, each_backend, rows, elements):
    check_against_float64(each_backend, make_transition(rows=rows, shape=(elements,)))


@pytest.mark.usefixtures("poisoned")
def test_every_backend_on_rows_of_more_sums_than_one_program_holds(make_transition, each_backend, tile):
    tile(4, 8192)
    elements = 70_000 if each_backend.interpreted else 600_000
    check_against_float64(each_backend, make_transition(rows=1, shape=(elements,)))


@settings(max_examples=12)
@given(
    rows=st.integers(1, 3),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    samples=st.integers(2, 33),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    guided=st.booleans(),
    with_reference=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    clip_range=st.none() | st.just(0.2),
    seed=st.integers(0, 2**31),
)
def test_every_backend_on_any_shape(
    make_transition,
    each_backend,
    rows,
    shape,
    samples,
    dtype,
    guided,
    with_reference,
    reduction,
    clip_range,
    seed,
):
    check_against_float64(
        each_backend,
        make_transition(rows, tuple(shape), dtype=dtype, seed=seed),
        samples=samples,
        guided=guided,
        with_reference=with_reference,
        reduction=reduction,
        clip_range=clip_range,
    )


def test_a_loss_scale_of_one_leaves_the_gradients_as_they_were_made(make_transition, each_backend):
    check_against_float64(each_backend, make_transition(rows=5), loss_scale=1.0)


def plain_old_logprob(case, guidance_scale: float | None, reduction: str) -> Tensor:
    return transition_logprob(
        case.model_output,
        case.sample,
        case.prev_sample,
        case.table,
        case.step,
        uncond_output=None if guidance_scale is None else case.uncond_output,
        guidance_scale=1.0 if guidance_scale is None else guidance_scale,
        reduction=reduction,
    )


def run_loop(case, rewards: Tensor, trajectory: Tensor, **options) -> LoopLoss:
    options = {"clip_range": 0.2, "old_logprob": plain_old_logprob(case, None, "mean")} | options
    output = options.pop("model_output", case.model_output)
    return loop_loss(
        output,
        case.sample,
        case.prev_sample,
        case.table,
        case.step,
        options.pop("old_logprob"),
        rewards,
        trajectory,
        **options,
    )


def test_advantages_are_leave_one_out_of_the_trajectorys_group(transition):
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    trajectory = torch.tensor([2, 0, 5, 3, 2])
    result = run_loop(transition, rewards, trajectory)
    assert torch.equal(result.advantage, leave_one_out(rewards).flatten()[trajectory])
    assert result.advantage.tolist() == [4.5, -3.0, 3.0, -1.5, 4.5]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_advantages_are_scaled_before_they_are_clipped(transition, as_tensor):
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    trajectory = torch.tensor([2, 0, 5, 3, 2])
    scale = torch.tensor(0.5) if as_tensor else 0.5
    result = run_loop(transition, rewards, trajectory, advantage_scale=scale, advantage_clip=2.0)
    assert result.advantage.tolist() == [2.0, -1.5, 1.5, -0.75, 2.0]


@pytest.mark.parametrize("reward", [22.7, 100000.3])
def test_equal_rewards_have_no_advantage_however_it_is_scaled(make_transition, each_backend, reward):
    case = make_transition(rows=2).to(each_backend.device)
    rewards = torch.full((2, 21), reward, device=each_backend.device)
    with each_backend.active():
        result = run_loop(
            case, rewards, torch.tensor([3, 41], device=each_backend.device), advantage_scale=1e6
        )
    assert result.advantage.tolist() == [0.0, 0.0]


def test_loop_loss_is_clipped_loss_with_leave_one_out_advantages(transition):
    rewards, trajectory = torch.randn(2, 3), torch.tensor([2, 0, 5, 3, 2])
    old_logprob = plain_old_logprob(transition, None, "mean") + 0.1 * torch.randn(5)
    first, second = (transition.model_output.clone().requires_grad_() for _ in range(2))
    options = {"clip_range": 0.05, "reference_output": transition.reference_output, "kl_weight": 0.1}
    ours = run_loop(transition, rewards, trajectory, model_output=first, old_logprob=old_logprob, **options)
    theirs = clipped_loss(
        second,
        transition.sample,
        transition.prev_sample,
        transition.table,
        transition.step,
        old_logprob,
        leave_one_out(rewards).flatten()[trajectory],
        **options,
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    ours.loss.backward()
    theirs.loss.backward()
    assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("shape", "reduction"),
    [((4, 3, 3), "mean"), ((4, 3, 3), "sum"), ((2, 64, 64), "mean"), ((17_000,), "sum")],
)
def test_ratio_is_exactly_one_before_the_first_update(make_transition, each_backend, dtype, reduction, shape):
    each_backend.skip_unless_it_takes(dtype)
    rows = 2 if each_backend.interpreted or shape != (4, 3, 3) else 16
    case = make_transition(rows=rows, shape=shape, dtype=dtype).to(each_backend.device)
    options = {"uncond_output": case.uncond_output, "guidance_scale": 3.0, "reduction": reduction}
    with each_backend.active():
        prev, old = denoise_step(case.model_output, case.sample, case.table, case.step, case.seed, **options)
        result = loop_loss(
            case.model_output.requires_grad_(),
            case.sample,
            prev,
            case.table,
            case.step,
            old,
            torch.randn(rows // 2, 2, device=each_backend.device),
            torch.randperm(rows).to(each_backend.device),
            clip_range=1e-4,
            reference_output=case.reference_output,
            **options,
        )
    assert torch.equal(result.ratio, torch.ones_like(result.ratio))
    assert not result.clipped.any()


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "clipped"),
    [
        (1.0, 0.5, True),  # already likelier than the range allows
        (1.0, -0.5, False),  # unlikelier: pulled back
        (-1.0, 0.5, False),
        (-1.0, -0.5, True),
        (1.0, 0.1, False),
        (-1.0, -0.1, False),
        (0.0, 0.5, False),
    ],
)
def test_clipping_cuts_the_gradient_on_one_side(make_transition, advantage, log_ratio, clipped):
    case = make_transition(rows=1, dtype=torch.float64)
    old_logprob = plain_old_logprob(case, None, "mean") - log_ratio
    output = case.model_output.requires_grad_()
    arguments = (output, case.sample, case.prev_sample, case.table, case.step, old_logprob)
    result = clipped_loss(*arguments, torch.tensor([advantage]), clip_range=0.2)
    assert result.clipped.item() is clipped
    result.loss.backward()
    assert bool(output.grad.any()) is (not clipped and advantage != 0)
    assert not clipped_loss(*arguments, torch.tensor([advantage]), clip_range=None).clipped.item()


@pytest.mark.parametrize("log_ratio", [25.0, -25.0])
@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_runaway_ratio_is_clamped_and_gets_no_gradient(make_transition, log_ratio, clip_range):
    case = make_transition(rows=2)
    old_logprob = plain_old_logprob(case, None, "mean") - log_ratio
    output = case.model_output.requires_grad_()
    result = clipped_loss(
        output,
        case.sample,
        case.prev_sample,
        case.table,
        case.step,
        old_logprob,
        torch.tensor([1.0, -1.0]),
        clip_range=clip_range,
    )
    torch.testing.assert_close(result.ratio.log(), torch.full((2,), log_ratio).clamp(-20, 20))
    assert result.clipped.all()
    result.loss.backward()
    assert not output.grad.any()


def test_kl_pulls_even_where_the_surrogate_is_clipped(make_transition):
    case = make_transition(rows=1, dtype=torch.float64)
    output = case.model_output.requires_grad_()
    result = clipped_loss(
        output,
        case.sample,
        case.prev_sample,
        case.table,
        case.step,
        plain_old_logprob(case, None, "mean") - 1.0,
        torch.ones(1),
        clip_range=0.2,
        reference_output=case.reference_output,
        kl_weight=0.5,
    )
    assert result.clipped.all()
    assert result.kl.item() > 0
    result.loss.backward()
    _, b, sigma = case.table[case.step[0]]
    expected = 0.5 * (b / sigma) ** 2 * (output - case.reference_output) / output.numel()
    torch.testing.assert_close(output.grad, expected.detach())


def test_kl_is_zero_without_a_reference_and_at_the_reference(transition):
    rewards, trajectory = torch.randn(2, 3), torch.arange(5)
    assert not run_loop(transition, rewards, trajectory).kl.any()
    assert not run_loop(transition, rewards, trajectory, reference_output=transition.model_output).kl.any()
    # With a reference and no weight the divergence is reported, not trained on.
    watched = run_loop(transition, rewards, trajectory, reference_output=transition.reference_output)
    assert (watched.kl > 0).all()
    assert torch.equal(watched.loss, run_loop(transition, rewards, trajectory).loss)


def test_deterministic_step_has_no_gradient(transition):
    transition.table[:, 2] = 0.0
    output = transition.model_output.requires_grad_()
    result = run_loop(
        transition,
        torch.randn(2, 3),
        torch.arange(5),
        model_output=output,
        old_logprob=torch.zeros(5),
        reference_output=transition.reference_output,
        kl_weight=1.0,
    )
    assert torch.equal(result.ratio, torch.ones(5))
    assert not result.kl.any()
    result.loss.backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_only_the_loss_is_differentiable(transition, each_backend):
    transition = transition.to(each_backend.device)
    rewards, trajectory = (t.to(each_backend.device) for t in (torch.randn(2, 3), torch.arange(5)))
    output = transition.model_output.requires_grad_()
    with each_backend.active():
        result = run_loop(transition, rewards, trajectory, model_output=output)
        with torch.no_grad():
            silent = run_loop(transition, rewards, trajectory, model_output=output)
    assert [part.requires_grad for part in result] == [True, False, False, False, False, False]
    assert not silent.loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_gradcheck(make_transition, reduction, clip_range):
    case = make_transition(rows=4, shape=(2, 3), dtype=torch.float64)
    # Far from the kinks at +-0.2.
    offsets = torch.tensor([0.05, -0.4, 0.4, -0.1], dtype=torch.float64)
    old_logprob = plain_old_logprob(case, 2.5, reduction) + offsets

    def function(output: Tensor, uncond: Tensor) -> Tensor:
        return loop_loss(
            output,
            case.sample,
            case.prev_sample,
            case.table,
            case.step,
            old_logprob,
            torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64),
            torch.arange(4),
            clip_range=clip_range,
            uncond_output=uncond,
            guidance_scale=2.5,
            reference_output=case.reference_output,
            kl_weight=0.2,
            reduction=reduction,
        ).loss

    inputs = (case.model_output.requires_grad_(), case.uncond_output.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


def test_float16_gradient_survives_until_the_loss_is_scaled(make_transition):
    case = make_transition(rows=64, shape=(4, 32, 32), dtype=torch.float16)
    old_logprob, advantage = plain_old_logprob(case, None, "mean"), torch.randn(64)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        output, sample, prev_sample = (
            latents.detach().to(dtype) for latents in (case.model_output, case.sample, case.prev_sample)
        )
        output.requires_grad_()
        result = clipped_loss(
            output, sample, prev_sample, case.table, case.step, old_logprob, advantage, clip_range=0.2
        )
        (result.loss * 2.0**16).backward()
        gradients.append(output.grad.double())
    # Unscaled, the elements are near 1e-6, where float16 holds no more than a digit.
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 5e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_inputs(make_transition, dtype):
    case = make_transition(dtype=dtype)
    output, uncond = case.model_output.requires_grad_(), case.uncond_output.requires_grad_()
    run_loop(
        case,
        torch.randn(2, 3),
        torch.arange(5),
        model_output=output,
        uncond_output=uncond,
        guidance_scale=2.0,
    ).loss.backward()
    assert output.grad.dtype == uncond.grad.dtype == dtype


@pytest.mark.parametrize("elements", [257, 20_000])
def test_rows_do_not_depend_on_their_neighbors(make_transition, each_backend, tile, elements):
    tile(8, 2048)
    count = 17 if elements < 20_000 and not each_backend.interpreted else 3
    case = make_transition(rows=count, shape=(elements,))
    rewards, trajectory = torch.randn(20, 4), torch.randint(80, (count,))
    old_logprob = plain_old_logprob(case, None, "mean") + 0.1 * torch.randn(count)

    def run(rows: Tensor) -> tuple[LoopLoss, Tensor]:
        part = case.rows(rows).to(each_backend.device)
        output = part.model_output.requires_grad_()
        with each_backend.active():
            result = run_loop(
                part,
                rewards.to(each_backend.device),
                trajectory[rows].to(each_backend.device),
                model_output=output,
                old_logprob=old_logprob[rows].to(each_backend.device),
                reference_output=part.reference_output,
                kl_weight=0.1,
            )
            # Of the sum over rows, not their mean; a power of two would be exact.
            (gradient,) = torch.autograd.grad(result.loss, output)
        return result, gradient

    whole, gradient = run(torch.arange(count))
    before = torch.get_num_threads()
    for rows, threads in ((1, 1), (2, 3), (4, 1), (count, 3)):
        if rows > count:
            continue
        order = torch.randperm(count)[:rows]
        torch.set_num_threads(threads)
        result, part = run(order)
        for ours, theirs in zip(result[1:], whole[1:], strict=True):
            assert torch.equal(ours, theirs[order.to(theirs.device)])
        assert rms(part * rows, gradient[order.to(gradient.device)] * count) < 1e-6
    torch.set_num_threads(before)


def test_threads_change_no_bit(make_transition, each_backend):
    if each_backend.name == "triton":
        pytest.skip("threads are the CPU's backends'")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        case = make_transition(rows=3, shape=(20_000,)).to(each_backend.device)
        output = case.model_output.requires_grad_()
        with each_backend.active():
            loss = run_loop(
                case,
                torch.tensor([[1.0, 2.0]], device=each_backend.device),
                torch.tensor([0, 1, 0], device=each_backend.device),
                model_output=output,
                reference_output=case.reference_output,
                kl_weight=0.1,
            ).loss
            results.append((loss.detach(), *torch.autograd.grad(loss, output)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_graph_may_be_kept_for_another_backward_pass(make_transition, dtype):
    case = make_transition(dtype=dtype)
    output = case.model_output.requires_grad_()
    loss = run_loop(case, torch.randn(2, 3), torch.arange(5), model_output=output).loss
    first = torch.autograd.grad(loss * 8, output, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss * 16, output, retain_graph=True)[0]
    third = torch.autograd.grad(loss, output)[0]
    assert torch.equal(second, first * 2)
    assert rms(third * 8, first) < 1e-3
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, output)


@pytest.mark.parametrize("needed", ["model_output", "uncond_output"])
def test_only_the_gradient_that_is_needed_is_made(transition, needed):
    wanted = getattr(transition, needed).requires_grad_()
    options = {"uncond_output": transition.uncond_output, "guidance_scale": 2.0}
    loss = run_loop(transition, torch.randn(2, 3), torch.arange(5), **options).loss
    loss.backward()
    assert wanted.grad.any()
    other = {"model_output": "uncond_output", "uncond_output": "model_output"}[needed]
    assert getattr(transition, other).grad is None


def test_opcheck(transition):
    output = transition.model_output.requires_grad_()
    uncond = transition.uncond_output.requires_grad_()
    data = (transition.sample, transition.prev_sample, transition.table, transition.step, torch.randn(5))
    options = (0.2, uncond, 2.0, transition.reference_output, 0.1, "mean", True, True)
    bare = (None, None, 1.0, None, 0.0, "sum", False, False)
    group = (torch.randn(2, 3), torch.arange(5), torch.tensor(1.0), 5.0)
    torch.library.opcheck(torch.ops.loopfast.loop_loss.default, (output, *data, *group, *options))
    torch.library.opcheck(torch.ops.loopfast.clipped_loss.default, (output, *data, torch.randn(5), *options))
    torch.library.opcheck(
        torch.ops.loopfast.clipped_loss.default, (output.detach(), *data, torch.randn(5), *bare)
    )


def test_compiles_in_one_graph(transition):
    rewards, trajectory = torch.randn(2, 3), torch.arange(5)

    def function(output: Tensor) -> Tensor:
        return run_loop(transition, rewards, trajectory, model_output=output, old_logprob=torch.zeros(5)).loss

    output = transition.model_output.requires_grad_()
    expected = torch.autograd.grad(function(output), output)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(output), output)[0], expected[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": torch.zeros(3, 1)}, ValueError, "K = 1 .* leave-one-out needs at least 2"),
        ({"rewards": torch.zeros(6)}, ValueError, r"rewards must have shape \[G, K\], got \[6\]"),
        ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "rewards must be float32 or float64"),
        ({"trajectory": torch.arange(4)}, ValueError, r"trajectory must have shape \[5\]"),
        ({"trajectory": torch.full((5,), 6)}, ValueError, r"trajectory must lie in \[0, 6\)"),
        ({"trajectory": torch.zeros(5)}, TypeError, "trajectory must be int64"),
        ({"old_logprob": torch.zeros(4)}, ValueError, r"old_logprob must have shape \[5\]"),
        ({"clip_range": 0.0}, ValueError, "clip_range must lie between 0 and 1"),
        ({"clip_range": 1.5}, ValueError, "clip_range must lie between 0 and 1"),
        ({"kl_weight": -1.0}, ValueError, "kl_weight must not be negative"),
        ({"kl_weight": 0.1}, ValueError, "kl_weight=0.1 needs reference_output"),
        ({"advantage_clip": 0.0}, ValueError, "advantage_clip must be positive"),
        ({"advantage_scale": torch.ones(5)}, ValueError, r"advantage_scale must have shape \[\]"),
        ({"reference_output": torch.zeros(5, 1)}, ValueError, "reference_output must have shape"),
        ({"step": torch.full((5,), 4)}, ValueError, "step must lie in"),
    ],
)
def test_errors_name_the_argument(transition, change, error, message):
    arguments = {
        name: getattr(transition, name) for name in ("model_output", "sample", "prev_sample", "table", "step")
    } | {
        "old_logprob": torch.zeros(5),
        "rewards": torch.zeros(2, 3),
        "trajectory": torch.arange(5),
        "clip_range": 0.2,
    }
    with pytest.raises(error, match=message):
        loop_loss(**(arguments | change))


def test_given_advantages_are_checked(transition):
    arguments = (
        transition.model_output,
        transition.sample,
        transition.prev_sample,
        transition.table,
        transition.step,
    )
    with pytest.raises(ValueError, match=r"advantage must have shape \[5\], got \[5, 1\]"):
        clipped_loss(*arguments, torch.zeros(5), torch.zeros(5, 1), clip_range=None)
