"""The ops on a GPU: the CPU's results, no synchronization with the host, capture in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from loopfast_kernels import denoise_step, denoise_step_, loop_loss, philox_normal

pytestmark = pytest.mark.gpu


@pytest.fixture
def pair(make_transition) -> tuple:
    """The same arguments on the CPU and on the GPU."""
    case = make_transition(rows=32, shape=(4, 8, 8))
    fields = {name: getattr(case, name).cuda() for name in case.__dataclass_fields__}
    return case, replace(case, **fields)


@pytest.fixture
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_noise_is_that_of_the_cpu(pair):
    cpu, gpu = (philox_normal(case.seed, case.step, case.sample.shape) for case in pair)
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=4e-6)


def test_results_are_those_of_the_cpu(pair):
    losses, gradients = [], []
    rewards = torch.randn(8, 4)
    for case in pair:
        prev, logprob = denoise_step(case.model_output, case.sample, case.table, case.step, case.seed)
        output = case.model_output.clone().requires_grad_()
        trajectory = torch.arange(32, device=output.device)
        result = loop_loss(
            output,
            case.sample,
            prev,
            case.table,
            case.step,
            logprob,
            rewards.to(output.device),
            trajectory,
            clip_range=0.2,
            uncond_output=case.uncond_output,
            guidance_scale=1.0,
        )
        result.loss.backward()
        losses.append(result.loss.detach().cpu())
        gradients.append(output.grad.cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_nothing_waits_for_the_device(pair, no_synchronization):
    _, case = pair
    rewards = torch.zeros(8, 4, device="cuda")
    trajectory = torch.arange(32, device="cuda")
    prev, logprob = denoise_step(case.model_output, case.sample, case.table, case.step, case.seed)
    output = case.model_output.requires_grad_()
    loop_loss(
        output, case.sample, prev, case.table, case.step, logprob, rewards, trajectory, clip_range=0.2
    ).loss.backward()


def test_one_captured_launch_serves_every_step(pair):
    _, case = pair
    steps, rows = len(case.table), len(case.step)
    trajectory = torch.zeros(steps + 1, *case.sample.shape, device="cuda")
    logprob = torch.zeros(steps, rows, device="cuda")
    model_input = torch.zeros_like(case.sample)
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")

    def advance() -> None:
        denoise_step_(case.model_output, trajectory, logprob, model_input, counter, case.table, case.seed)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()

    counter.zero_()
    trajectory[0] = case.sample
    sample = case.sample
    for index in range(steps):
        graph.replay()
        step = torch.full((rows,), index, device="cuda")
        sample, expected = denoise_step(case.model_output, sample, case.table, step, case.seed)
        torch.testing.assert_close(trajectory[index + 1], sample)
        torch.testing.assert_close(logprob[index], expected)
    assert counter.item() == steps
