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

    ``grad_output`` and ``grad_uncond`` are the loss's gradients in the dtypes of the two outputs, empty where
    they were not asked for. Where an output is float16 row ``i`` holds its gradient divided by
    ``grad_scale[i]``, a power of two that keeps the values near 1; elsewhere ``grad_scale`` is empty.
    """

    loss: Tensor
    logprob: Tensor
    ratio: Tensor
    advantage: Tensor
    clipped: Tensor
    kl: Tensor
    grad_output: Tensor
    grad_uncond: Tensor
    grad_scale: Tensor


def has_scaled_rows(model_output: Tensor, uncond_output: Tensor | None) -> bool:
    """Whether gradients are kept divided by `grad_scale`.

    In float16 they would underflow before the backward pass multiplies them by the loss scale.
    """
    half = torch.float16
    return model_output.dtype == half or (uncond_output is not None and uncond_output.dtype == half)


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
    with_uncond_grad: bool,
) -> LossAndGradient:
    """The loss for given advantages ``[N]``; the arguments are those of `loopfast_kernels.clipped_loss`."""
    dtype = arithmetic_dtype(model_output, sample)
    at = gather_coefficients(table, step, dtype)
    output = guided_output(model_output, uncond_output, guidance_scale, dtype)
    mean = transition_mean(at, as_rows(sample, dtype), output)
    residual = (as_rows(prev_sample, dtype) - mean) * at.inverse_sigma
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
    loss = (row_sum(rows.double()[None, :])[0] / count).to(dtype)

    grad_output = model_output.new_empty(0)
    grad_uncond = grad_output if uncond_output is None else uncond_output.new_empty(0)
    grad_scale = logprob.new_empty(0)
    if with_grad or with_uncond_grad:
        share = 1.0 / (count * residual.shape[1] if reduction == "mean" else count)
        # d surrogate / d logprob is the surrogate itself, -A r, and d logprob / dm = (b / sigma) residual.
        weight = torch.where(flat, 0.0, -advantage * ratio)[:, None] * share * at.slope
        by_output = weight * residual
        magnitude = weight.abs()
        if shift is not None:
            kl_slope = (kl_weight * share) * at.slope
            by_output = by_output + kl_slope * shift
            magnitude = magnitude + kl_slope.abs() * row_reduce(shift * shift, "mean")[:, None].sqrt()
        if has_scaled_rows(model_output, uncond_output):
            grad_scale = power_of_two(magnitude[:, 0])
            by_output = by_output / grad_scale[:, None]
        if with_grad:
            scale = 1.0 if uncond_output is None else guidance_scale
            grad_output = (by_output * scale).reshape(model_output.shape).to(model_output.dtype)
        if with_uncond_grad and uncond_output is not None:
            grad_uncond = (by_output * (1.0 - guidance_scale)).reshape(model_output.shape)
            grad_uncond = grad_uncond.to(uncond_output.dtype)
    return LossAndGradient(loss, logprob, ratio, advantage, flat, kl, grad_output, grad_uncond, grad_scale)


def power_of_two(magnitude: Tensor) -> Tensor:
    """The largest power of two not above each magnitude; 1 for 0 and for what is not finite."""
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(-126, 126)
    return torch.where(
        (magnitude > 0) & magnitude.isfinite(), torch.ldexp(torch.ones_like(magnitude), exponent), 1.0
    )


def scale_gradients_(grad_output: Tensor, grad_uncond: Tensor, grad_scale: Tensor, grad_loss: Tensor) -> None:
    """The backward pass: multiply the gradients in place by the loss's gradient ``[]`` and the rows' scales."""
    factor = grad_loss * grad_scale if grad_scale.numel() else grad_loss.expand(1)
    for grad in (grad_output, grad_uncond):
        if grad.numel():
            grad.copy_(grad * factor.reshape(-1, *(1,) * (grad.dim() - 1)))


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
    with_uncond_grad: bool,
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
        with_uncond_grad,
    )
