from __future__ import annotations

from loopfast_kernels import transition_logprob


def test_forward(benchmark, batch):
    benchmark(
        transition_logprob, batch.model_output, batch.sample, batch.prev_sample, batch.table, batch.step
    )


def test_forward_and_backward(benchmark, batch):
    output = batch.model_output.requires_grad_()

    def run():
        output.grad = None
        transition_logprob(output, batch.sample, batch.prev_sample, batch.table, batch.step).sum().backward()

    benchmark(run)
