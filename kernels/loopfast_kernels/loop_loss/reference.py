"""The clipped surrogate, its KL penalty and their gradient in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..leave_one_out.reference import leave_one_out
from ..reduction import row_sum
from ..transition_logprob.reference import (
    arithmetic_dtype,
    as_rows,
    gather_coefficients,
    gaussian_logprob,
    guided_output,
    row_reduce,
    transition_mean,
)
from ..validation import check_index

LOG_RATIO_LIMIT = 20.0


class LossAndGradient(NamedTuple):
    """Results of the loss ops.

    ``grad`` is the loss's gradient by the guided output, empty unless it was asked for.
    """

    loss: Tensor
    logprob: Tensor
    ratio: Tensor
    advantage: Tensor
    clipped: Tensor
    kl: Tensor
    grad: Tensor


def gradient_dtype(model_output: Tensor) -> torch.dtype:
    """The dtype the gradient is kept in between forward and backward.

    In float16 it would underflow before the backward pass multiplies it by the loss scale.
    """
    return torch.float32 if model_output.dtype == torch.float16 else model_output.dtype


def clipped_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_range: float | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reference_output: Tensor | None,
    kl_weight: float,
    reduction: str,
    with_grad: bool,
) -> LossAndGradient:
    """The loss for given advantages ``[N]``; the arguments are those of `loopfast_kernels.clipped_loss`."""
    dtype = arithmetic_dtype(model_output, sample)
    at = gather_coefficients(table, step, dtype)
    output = guided_output(model_output, uncond_output, guidance_scale, dtype)
    mean = transition_mean(at, as_rows(sample, dtype), output)
    residual = (as_rows(prev_sample, dtype) - mean) / at.divisor
    logprob = gaussian_logprob(at, residual, reduction)

    advantage = advantage.to(dtype)
    log_ratio = logprob - old_logprob.to(dtype)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate = -advantage * ratio
    flat = log_ratio.abs() > LOG_RATIO_LIMIT
    if clip_range is not None:
        limited = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
        flat = flat | (limited > surrogate)
        surrogate = torch.maximum(surrogate, limited)

    rows = surrogate
    kl = torch.zeros_like(logprob)
    shift = None
    if reference_output is not None:
        # Of two Gaussians of one sigma only the means differ, by b (m - m_ref).
        shift = at.slope * (output - as_rows(reference_output, dtype))
        kl = 0.5 * row_reduce(shift * shift, reduction)
        rows = rows + kl_weight * kl
    count = rows.shape[0]
    loss = row_sum(rows[None, :])[0] / count

    grad = model_output.new_empty(0, dtype=gradient_dtype(model_output))
    if with_grad:
        share = 1.0 / (count * residual.shape[1] if reduction == "mean" else count)
        # d surrogate / d logprob is the surrogate itself, -A r, and d logprob / dm = (b / sigma) residual.
        weight = torch.where(flat, 0.0, -advantage * ratio) * share
        by_output = weight[:, None] * at.slope * residual
        if shift is not None:
            by_output = by_output + (kl_weight * share) * at.slope * shift
        grad = by_output.reshape(model_output.shape).to(grad.dtype)
    return LossAndGradient(loss, logprob, ratio, advantage, flat, kl, grad)


def loop_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    rewards: Tensor,
    trajectory: Tensor,
    advantage_scale: Tensor,
    advantage_clip: float | None,
    clip_range: float | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reference_output: Tensor | None,
    kl_weight: float,
    reduction: str,
    with_grad: bool,
) -> LossAndGradient:
    """The loss for given rewards ``[G, K]``; the arguments are those of `loopfast_kernels.loop_loss`."""
    check_index("trajectory", trajectory, rewards.numel())
    dtype = arithmetic_dtype(model_output, sample)
    advantage = leave_one_out(rewards.to(dtype)).flatten().index_select(0, trajectory)
    advantage = advantage * advantage_scale.to(dtype)
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    return clipped_loss(
        model_output,
        sample,
        prev_sample,
        table,
        step,
        old_logprob,
        advantage,
        clip_range,
        uncond_output,
        guidance_scale,
        reference_output,
        kl_weight,
        reduction,
        with_grad,
    )
