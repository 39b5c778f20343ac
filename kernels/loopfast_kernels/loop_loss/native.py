"""The clipped surrogate, its KL penalty and their gradients in the native library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..buffers import empty_like
from ..native_library import LossArguments, LossResults, as_float32, call, latents, pointer, transition_struct
from ..transition import Transition
from .reference import LossAndGradient, Options, Rewards, has_scaled_rows


def loop_loss(
    transition: Transition, prev_sample: Tensor, old_logprob: Tensor, rewards: Rewards, options: Options
) -> LossAndGradient:
    """Returns the loss for rewards ``[G, K]``, as `reference` does."""
    values, clip = as_float32(rewards.rewards), rewards.advantage_clip
    arguments = LossArguments(
        rewards=pointer("rewards", values),
        groups=values.shape[0],
        samples=values.shape[1],
        trajectory=pointer("trajectory", rewards.trajectory),
        advantage_scale=float(rewards.advantage_scale),
        advantage_clip=math.inf if clip is None else clip,
    )
    return _loss(transition, prev_sample, old_logprob, arguments, options)


def clipped_loss(
    transition: Transition, prev_sample: Tensor, old_logprob: Tensor, advantage: Tensor, options: Options
) -> LossAndGradient:
    """Returns the loss for advantages ``[N]``, as `reference` does."""
    advantage = as_float32(advantage)
    arguments = LossArguments(advantage=pointer("advantage", advantage))
    return _loss(transition, prev_sample, old_logprob, arguments, options)


def _loss(
    transition: Transition,
    prev_sample: Tensor,
    old_logprob: Tensor,
    arguments: LossArguments,
    options: Options,
) -> LossAndGradient:
    old_logprob = as_float32(old_logprob)
    arguments.prev_sample = latents("prev_sample", prev_sample)
    arguments.old_logprob = pointer("old_logprob", old_logprob)
    arguments.clip_range = math.inf if options.clip_range is None else options.clip_range
    arguments.reference_output = latents("reference_output", options.reference_output)
    arguments.kl_weight = options.kl_weight

    output = transition.model_output
    uncond = output if transition.uncond_output is None else transition.uncond_output
    scaled = has_scaled_rows(transition, options)
    loss = old_logprob.new_empty(())
    logprob, ratio, advantage, kl = [torch.empty_like(old_logprob) for _ in range(4)]
    clipped = torch.empty_like(old_logprob, dtype=torch.bool)
    grad_output = empty_like(output) if options.with_grad else output.new_empty(0)
    grad_uncond = empty_like(uncond) if options.with_uncond_grad else uncond.new_empty(0)
    grad_scale = old_logprob.new_empty(old_logprob.shape if scaled else 0)
    call(
        "loopfast_loss",
        transition_struct(transition, options.reduction),
        arguments,
        LossResults(
            loss.data_ptr(),
            logprob.data_ptr(),
            ratio.data_ptr(),
            advantage.data_ptr(),
            clipped.data_ptr(),
            kl.data_ptr(),
            latents("grad_output", grad_output),
            latents("grad_uncond", grad_uncond),
            grad_scale.data_ptr() if scaled else None,
        ),
    )
    return LossAndGradient(loss, logprob, ratio, advantage, clipped, kl, grad_output, grad_uncond, grad_scale)


def scale_gradients_(grad_output: Tensor, grad_uncond: Tensor, grad_scale: Tensor, grad_loss: Tensor) -> None:
    """Scales the gradients in the backward pass, as `reference` does."""
    shape = (grad_output if grad_output.numel() else grad_uncond).shape
    call(
        "loopfast_scale_gradients",
        shape[0],
        math.prod(shape[1:]),
        latents("grad_output", grad_output),
        latents("grad_uncond", grad_uncond),
        grad_scale.data_ptr() if grad_scale.numel() else None,
        float(grad_loss),
        torch.get_num_threads(),
    )
