"""The clipped surrogate, its KL penalty and their gradient in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..leave_one_out.reference import leave_one_out
from ..reduction import row_sum
from ..transition import Transition
from ..transition_logprob.reference import (
    arithmetic_dtype,
    as_rows,
    distribution,
    gaussian_logprob,
    row_reduce,
    standardized,
)
from ..validation import check_index

LOG_RATIO_LIMIT = 20.0


class Rewards(NamedTuple):
    """The arguments of `loopfast_kernels.loop_loss` that the advantages follow from.

    Attributes:
        rewards: ``[G, K]``.
        trajectory: int64 ``[N]``, each row's flat index into `rewards`.
        advantage_scale: ``[]``.
        advantage_clip: limit of an advantage's magnitude, or None.
    """

    rewards: Tensor
    trajectory: Tensor
    advantage_scale: Tensor
    advantage_clip: float | None


class Options(NamedTuple):
    """The other arguments that both losses share, and the gradients to make."""

    clip_range: float | None
    reference_output: Tensor | None
    kl_weight: float
    reduction: str
    with_grad: bool
    with_uncond_grad: bool


class LossAndGradient(NamedTuple):
    """Results of the loss ops.

    ``grad_output`` and ``grad_uncond`` are the loss's gradients in the dtypes of the two outputs. One that was not
    asked for is empty. Where an output is float16, row ``i`` holds its gradient divided by ``grad_scale[i]``, a
    power of two that keeps the values near 1; for other dtypes ``grad_scale`` is empty.
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


def has_scaled_rows(transition: Transition, options: Options) -> bool:
    """Returns whether gradients are kept divided by ``grad_scale``.

    In float16 they would underflow before the backward pass multiplies them by the loss scale.
    """
    dtypes = [
        output.dtype for output in (transition.model_output, transition.uncond_output) if output is not None
    ]
    return (options.with_grad or options.with_uncond_grad) and torch.float16 in dtypes


def clipped_loss(
    transition: Transition, prev_sample: Tensor, old_logprob: Tensor, advantage: Tensor, options: Options
) -> LossAndGradient:
    """Returns the loss for advantages ``[N]``; the arguments are those of `loopfast_kernels.clipped_loss`."""
    at, output, mean = distribution(transition)
    dtype = mean.dtype
    residual = standardized(prev_sample, mean, at)
    logprob = gaussian_logprob(at, residual, options.reduction)

    advantage = advantage.to(dtype)
    log_ratio = logprob - old_logprob.to(dtype)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate = -advantage * ratio
    clipped = log_ratio.abs() > LOG_RATIO_LIMIT
    if options.clip_range is not None:
        clipped_ratio = ratio.clamp(1.0 - options.clip_range, 1.0 + options.clip_range)
        clipped_surrogate = -advantage * clipped_ratio
        clipped = clipped | (clipped_surrogate > surrogate)
        surrogate = torch.maximum(surrogate, clipped_surrogate)

    row_loss = surrogate
    kl = torch.zeros_like(logprob)
    shift = None
    if options.reference_output is not None:
        # The two Gaussians have one sigma: only their means differ, by b (m - m_ref).
        shift = at.slope * (output - as_rows(options.reference_output, dtype))
        kl = 0.5 * row_reduce(shift * shift, options.reduction)
        row_loss = row_loss + options.kl_weight * kl
    rows, elements = residual.shape
    loss = (row_sum(row_loss.double()[None, :])[0] / rows).to(dtype)

    output, uncond = transition.model_output, transition.uncond_output
    grad_output = output.new_empty(0)
    grad_uncond = grad_output if uncond is None else uncond.new_empty(0)
    grad_scale = logprob.new_empty(0)
    if options.with_grad or options.with_uncond_grad:
        row_weight = 1.0 / (rows * elements if options.reduction == "mean" else rows)
        # d surrogate / d logprob is the surrogate itself, -A r, and d logprob / dm = (b / sigma) residual.
        weight = torch.where(clipped, 0.0, -advantage * ratio)[:, None] * row_weight * at.slope
        by_output = weight * residual
        magnitude = weight.abs()
        if shift is not None:
            kl_slope = (options.kl_weight * row_weight) * at.slope
            by_output = by_output + kl_slope * shift
            magnitude = magnitude + kl_slope.abs() * row_reduce(shift * shift, "mean")[:, None].sqrt()
        if has_scaled_rows(transition, options):
            grad_scale = power_of_two(magnitude[:, 0])
            by_output = by_output / grad_scale[:, None]
        guidance_scale = transition.guidance_scale
        if options.with_grad:
            factor = 1.0 if uncond is None else guidance_scale
            grad_output = (by_output * factor).reshape(output.shape).to(output.dtype)
        if options.with_uncond_grad and uncond is not None:
            grad_uncond = (by_output * (1.0 - guidance_scale)).reshape(output.shape).to(uncond.dtype)
    return LossAndGradient(loss, logprob, ratio, advantage, clipped, kl, grad_output, grad_uncond, grad_scale)


def power_of_two(magnitude: Tensor) -> Tensor:
    """Returns the largest power of two not above each magnitude; 1 for 0 and for values that are not finite."""
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(-126, 126)
    return torch.where(
        (magnitude > 0) & magnitude.isfinite(), torch.ldexp(torch.ones_like(magnitude), exponent), 1.0
    )


def scale_gradients_(grad_output: Tensor, grad_uncond: Tensor, grad_scale: Tensor, grad_loss: Tensor) -> None:
    """Multiplies the gradients in place by the loss's gradient ``[]`` and the rows' scales: the backward pass."""
    factor = grad_loss * grad_scale if grad_scale.numel() else grad_loss.expand(1)
    for grad in (grad_output, grad_uncond):
        if grad.numel():
            grad.copy_(grad * factor.reshape(-1, *(1,) * (grad.dim() - 1)))


def loop_loss(
    transition: Transition, prev_sample: Tensor, old_logprob: Tensor, rewards: Rewards, options: Options
) -> LossAndGradient:
    """Returns the loss for rewards ``[G, K]``; the arguments are those of `loopfast_kernels.loop_loss`."""
    check_index("trajectory", rewards.trajectory, rewards.rewards.numel())
    dtype = arithmetic_dtype(transition.model_output, transition.sample)
    advantage = leave_one_out(rewards.rewards.to(dtype)).flatten().index_select(0, rewards.trajectory)
    advantage = advantage * rewards.advantage_scale.to(dtype)
    if rewards.advantage_clip is not None:
        advantage = advantage.clamp(-rewards.advantage_clip, rewards.advantage_clip)
    return clipped_loss(transition, prev_sample, old_logprob, advantage, options)
