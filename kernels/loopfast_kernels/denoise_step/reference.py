"""One sampling step in plain torch."""

from __future__ import annotations

from torch import Tensor

from ..philox.reference import philox_normal
from ..transition import Transition
from ..transition_logprob.reference import distribution, gaussian_logprob, standardized


def denoise_step(transition: Transition, seed: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Returns ``x_{t-1}`` and its log-probability; the arguments are those of `loopfast_kernels.denoise_step`."""
    at, _, mean = distribution(transition)
    noise = philox_normal(seed, transition.step, mean.shape).to(mean.dtype)
    # The log-probability is that of the sample as it is stored: rounded.
    prev_sample = (mean + at.sigma * noise).to(transition.sample.dtype)
    logprob = gaussian_logprob(at, standardized(prev_sample, mean, at), reduction)
    return prev_sample.reshape(transition.sample.shape), logprob


def denoise_step_(
    transition: Transition, logprob: Tensor, model_input: Tensor, seed: Tensor, reduction: str
) -> None:
    """Takes the step in place; the arguments are those of `loopfast_kernels.denoise_step_`."""
    trajectory, step = transition.sample, transition.step
    rows = trajectory.shape[1]
    sample = trajectory.index_select(0, step).squeeze(0)
    prev_sample, step_logprob = denoise_step(
        transition._replace(sample=sample, step=step.expand(rows)), seed, reduction
    )
    trajectory.index_copy_(0, step + 1, prev_sample[None])
    logprob.index_copy_(0, step, step_logprob.to(logprob.dtype)[None])
    model_input.unflatten(0, (-1, rows)).copy_(prev_sample)
    step.add_(1)
