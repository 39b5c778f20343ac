"""One sampling step in plain torch."""

from __future__ import annotations

from torch import Tensor

from ..philox.reference import philox_normal
from ..transition_logprob.reference import (
    arithmetic_dtype,
    as_rows,
    gather_coefficients,
    gaussian_logprob,
    guided_output,
    transition_mean,
)


def denoise_step(
    model_output: Tensor,
    sample: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """``x_{t-1}`` and its log-probability; the arguments are those of `loopfast_kernels.denoise_step`."""
    dtype = arithmetic_dtype(model_output, sample)
    at = gather_coefficients(table, step, dtype)
    output = guided_output(model_output, uncond_output, guidance_scale, dtype)
    mean = transition_mean(at, as_rows(sample, dtype), output)
    noise = philox_normal(seed, step, mean.shape).to(dtype)
    prev_sample = (mean + at.sigma * noise).to(sample.dtype)
    # Scored as it is stored: rounded.
    residual = (prev_sample.to(dtype) - mean) * at.inverse_sigma
    return prev_sample.reshape(sample.shape), gaussian_logprob(at, residual, reduction)


def denoise_step_(
    model_output: Tensor,
    trajectory: Tensor,
    logprob: Tensor,
    model_input: Tensor,
    step: Tensor,
    table: Tensor,
    seed: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reduction: str,
) -> None:
    """The in-place form; the arguments are those of `loopfast_kernels.denoise_step_`."""
    rows = trajectory.shape[1]
    sample = trajectory.index_select(0, step).squeeze(0)
    prev_sample, step_logprob = denoise_step(
        model_output, sample, table, step.expand(rows), seed, uncond_output, guidance_scale, reduction
    )
    trajectory.index_copy_(0, step + 1, prev_sample[None])
    logprob.index_copy_(0, step, step_logprob.to(logprob.dtype)[None])
    model_input.unflatten(0, (-1, rows)).copy_(prev_sample)
    step.add_(1)
