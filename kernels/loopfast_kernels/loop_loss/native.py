"""The clipped surrogate, its KL penalty and their gradients in the native library."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..buffers import empty_like
from ..native_library import LossArguments, LossResults, as_float32, call, latents, pointer, transition
from .reference import LossAndGradient, has_scaled_rows


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
    *options: Any,
) -> LossAndGradient:
    """The loss for given rewards ``[G, K]``; as in `reference`."""
    rewards = as_float32(rewards)
    arguments = LossArguments(
        rewards=pointer("rewards", rewards),
        groups=rewards.shape[0],
        samples=rewards.shape[1],
        trajectory=pointer("trajectory", trajectory),
        advantage_scale=float(advantage_scale),
        advantage_clip=math.inf if advantage_clip is None else advantage_clip,
    )
    return _loss(arguments, model_output, sample, prev_sample, table, step, old_logprob, *options)


def clipped_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *options: Any,
) -> LossAndGradient:
    """The loss for given advantages ``[N]``; as in `reference`."""
    advantage = as_float32(advantage)
    arguments = LossArguments(advantage=pointer("advantage", advantage))
    return _loss(arguments, model_output, sample, prev_sample, table, step, old_logprob, *options)


def _loss(
    arguments: LossArguments,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    clip_range: float | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reference_output: Tensor | None,
    kl_weight: float,
    reduction: str,
    with_grad: bool,
    with_uncond_grad: bool,
) -> LossAndGradient:
    table, old_logprob = as_float32(table), as_float32(old_logprob)
    arguments.prev_sample = latents("prev_sample", prev_sample)
    arguments.old_logprob = pointer("old_logprob", old_logprob)
    arguments.clip_range = math.inf if clip_range is None else clip_range
    arguments.reference_output = latents("reference_output", reference_output)
    arguments.kl_weight = kl_weight

    uncond = model_output if uncond_output is None else uncond_output
    scaled = (with_grad or with_uncond_grad) and has_scaled_rows(model_output, uncond_output)
    loss = old_logprob.new_empty(())
    logprob, ratio, advantage, kl = [torch.empty_like(old_logprob) for _ in range(4)]
    clipped = torch.empty_like(old_logprob, dtype=torch.bool)
    grad_output = empty_like(model_output) if with_grad else model_output.new_empty(0)
    grad_uncond = empty_like(uncond) if with_uncond_grad else uncond.new_empty(0)
    grad_scale = old_logprob.new_empty(old_logprob.shape if scaled else 0)
    call(
        "loopfast_loss",
        transition(model_output, sample, table, step, uncond_output, guidance_scale, reduction),
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
    """The backward pass; as in `reference`."""
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
