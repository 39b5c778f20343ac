"""The ops on a GPU: exact where they promise it, no synchronization with the host, capture in a graph.

That they agree with float64 is tested with the other backends, op by op.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopfast_kernels import (
    LoopLoss,
    backend,
    backends,
    denoise_step,
    denoise_step_,
    loop_loss,
    philox_normal,
    transition_logprob,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One program for a row, several, and rows too large to keep; the last is not a power of two.
SHAPES = [(4, 8, 8), (4, 64, 64), (4, 128, 128), (16, 128, 128), (4, 96, 95)]


@pytest.fixture(autouse=True)
def _by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_requested", None)


def train(
    case, prev: Tensor, old: Tensor, rewards: Tensor, trajectory: Tensor
) -> tuple[LoopLoss, Tensor, Tensor]:
    """The guided loss with everything on, and both gradients."""
    output, uncond = case.model_output.clone().requires_grad_(), case.uncond_output.clone().requires_grad_()
    result = loop_loss(
        output,
        case.sample,
        prev,
        case.table,
        case.step,
        old,
        rewards,
        trajectory,
        clip_range=0.2,
        uncond_output=uncond,
        guidance_scale=2.0,
        reference_output=case.reference_output,
        kl_weight=0.1,
    )
    result.loss.backward()
    return result, output.grad, uncond.grad


def sample_guided(case) -> tuple[Tensor, Tensor]:
    return denoise_step(
        case.model_output,
        case.sample,
        case.table,
        case.step,
        case.seed,
        uncond_output=case.uncond_output,
        guidance_scale=2.0,
    )


def test_noise_has_the_bits_of_the_native_library(make_transition):
    case = make_transition(rows=32)
    cpu = philox_normal(case.seed, case.step, (32, 10_001))
    gpu = philox_normal(case.seed.to(DEVICE), case.step.to(DEVICE), (32, 10_001))
    assert torch.equal(gpu.cpu(), cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ratio_is_exactly_one_before_the_first_update(make_transition, dtype, shape):
    case = make_transition(rows=16, shape=shape, dtype=dtype).to(DEVICE)
    prev, old = sample_guided(case)
    again = transition_logprob(
        case.model_output,
        case.sample,
        prev,
        case.table,
        case.step,
        uncond_output=case.uncond_output,
        guidance_scale=2.0,
    )
    assert torch.equal(again, old)
    result, *_ = train(case, prev, old, torch.randn(4, 4, device=DEVICE), torch.arange(16, device=DEVICE))
    assert torch.equal(result.ratio, torch.ones_like(result.ratio))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_again_and_for_any_part_of_the_batch(make_transition, dtype, shape):
    case = make_transition(rows=16, shape=shape, dtype=dtype).to(DEVICE)
    prev, old = sample_guided(case)
    rewards, trajectory = torch.randn(4, 4, device=DEVICE), torch.randperm(16, device=DEVICE)
    result, *gradients = train(case, prev, old - 0.05, rewards, trajectory)
    for _ in range(3):
        for first, second in zip(sample_guided(case), (prev, old), strict=True):
            assert torch.equal(first, second)
        again, *others = train(case, prev, old - 0.05, rewards, trajectory)
        assert torch.equal(again.loss, result.loss)
        for gradient, other in zip(gradients, others, strict=True):
            assert torch.equal(gradient, other)
    order = torch.randperm(16, device=DEVICE)[:5]
    part = case.rows(order)
    for some, whole in zip(sample_guided(part), (prev, old), strict=True):
        assert torch.equal(some, whole[order])
    some, *_ = train(part, prev[order], old[order] - 0.05, rewards, trajectory[order])
    for name in ("logprob", "ratio", "advantage", "clipped", "kl"):
        assert torch.equal(getattr(some, name), getattr(result, name)[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_the_reference_on_the_cpu(make_transition, dtype):
    case = make_transition(rows=16, shape=(4, 64, 64), dtype=dtype)
    rewards, trajectory = torch.randn(4, 4), torch.arange(16)
    with backend("reference"):
        prev, old = sample_guided(case)
        exact = case.to(torch.float64)
        expected, *gradients = train(exact, prev.double(), old.double() - 0.05, rewards.double(), trajectory)
    gpu = case.to(DEVICE)
    result, *others = train(
        gpu, prev.to(DEVICE), old.to(DEVICE) - 0.05, rewards.to(DEVICE), trajectory.to(DEVICE)
    )
    torch.testing.assert_close(result.logprob.cpu().double(), expected.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        result.loss.detach().cpu().double(), expected.loss.detach(), rtol=1e-4, atol=1e-4
    )
    for gradient, other in zip(gradients, others, strict=True):
        assert other.dtype == dtype
        if dtype != torch.float16:  # unscaled, as here, float16 gradients of a mean underflow
            bound = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7}[dtype]
            assert (other.cpu().double() - gradient).norm() < bound * gradient.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_device(make_transition, shape):
    case = make_transition(rows=16, shape=shape).to(DEVICE)
    rewards, trajectory = torch.zeros(4, 4, device=DEVICE), torch.arange(16, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prev, old = sample_guided(case)
        train(case, prev, old, rewards, trajectory)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 64, 64)])
def test_one_captured_launch_serves_every_step(make_transition, dtype, shape):
    rows, steps = 16, 4
    case = make_transition(rows=rows, shape=shape, steps=steps, dtype=dtype).to(DEVICE)
    trajectory = torch.full((steps + 1, rows, *shape), torch.nan, dtype=dtype, device=DEVICE)
    logprob = torch.full((steps, rows), torch.nan, device=DEVICE)
    model_input = torch.full((2 * rows, *shape), torch.nan, dtype=dtype, device=DEVICE)
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def advance() -> None:
        denoise_step_(
            case.model_output,
            trajectory,
            logprob,
            model_input,
            counter,
            case.table,
            case.seed,
            uncond_output=case.uncond_output,
            guidance_scale=2.0,
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        advance()

    counter.zero_()
    trajectory[0] = case.sample
    sample = case.sample
    for index in range(steps):
        graph.replay()
        sample, expected = denoise_step(
            case.model_output,
            sample,
            case.table,
            torch.full((rows,), index, device=DEVICE),
            case.seed,
            uncond_output=case.uncond_output,
            guidance_scale=2.0,
        )
        assert torch.equal(trajectory[index + 1], sample)
        assert torch.equal(logprob[index], expected)
        assert torch.equal(model_input, torch.cat((sample, sample)))
    assert counter.item() == steps


def test_a_captured_update_replays(make_transition):
    case = make_transition(rows=16, shape=(4, 64, 64)).to(DEVICE)
    prev, old = sample_guided(case)
    rewards, trajectory = torch.randn(4, 4, device=DEVICE), torch.arange(16, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected, *gradients = train(case, prev, old - 0.05, rewards, trajectory)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result, *others = train(case, prev, old - 0.05, rewards, trajectory)
    graph.replay()
    assert torch.equal(result.loss, expected.loss)
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 128, 128)])
def test_memory_is_the_gradients_and_64_bytes_a_row(make_transition, shape):
    rows = 64
    case = make_transition(rows=rows, shape=shape).to(DEVICE)
    prev, old = sample_guided(case)
    rewards, trajectory = torch.randn(16, 4, device=DEVICE), torch.arange(rows, device=DEVICE)
    output, uncond = case.model_output.requires_grad_(), case.uncond_output.requires_grad_()

    def update() -> None:
        output.grad = uncond.grad = None
        loop_loss(
            output,
            case.sample,
            prev,
            case.table,
            case.step,
            old,
            rewards,
            trajectory,
            clip_range=0.2,
            uncond_output=uncond,
            guidance_scale=2.0,
        ).loss.backward()

    update()
    output.grad = uncond.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    update()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = output.nbytes + uncond.nbytes
    # The allocator hands out memory in pieces of 512 bytes; there are about twenty small tensors.
    assert extra <= gradients + 64 * rows + 20 * 512
