from __future__ import annotations

import torch

from loopfast_kernels import leave_one_out, loop_loss

SAMPLES = 4


def arguments(batch):
    rows = len(batch.step)
    old_logprob, rewards = torch.zeros(rows), torch.randn(rows // SAMPLES, SAMPLES)
    return (
        (batch.sample, batch.prev_sample, batch.table, batch.step, old_logprob, rewards, torch.arange(rows)),
        {"clip_range": 0.2, "uncond_output": batch.uncond_output, "guidance_scale": 5.0},
    )


def test_loop_loss_forward_and_backward(benchmark, batch):
    output = batch.model_output.requires_grad_()
    positional, options = arguments(batch)

    def run():
        output.grad = None
        loop_loss(output, *positional, **options).loss.backward()

    benchmark(run)


def test_the_formula_in_autograd(benchmark, batch):
    """The same loss and gradient as torch operations that autograd records: what `loop_loss` replaces."""
    output = batch.model_output.requires_grad_()
    (sample, prev_sample, table, step, old_logprob, rewards, trajectory), options = arguments(batch)

    def run():
        output.grad = None
        a, b, sigma = (column.reshape(-1, 1, 1, 1) for column in table[step].unbind(1))
        uncond = options["uncond_output"]
        guided = uncond + options["guidance_scale"] * (output - uncond)
        normal = torch.distributions.Normal(a * sample + b * guided, sigma)
        ratio = (normal.log_prob(prev_sample).flatten(1).mean(1) - old_logprob).exp()
        advantage = leave_one_out(rewards).flatten()[trajectory]
        torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean().backward()

    benchmark(run)
