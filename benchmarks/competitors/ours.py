"""``loopfast_kernels``."""

from __future__ import annotations

from torch import Tensor

import loopfast_kernels

from ..cases import ADVANTAGE_CLIP, CLIP_RANGE, GUIDANCE_SCALE, Schedule


def _scale(uncond_output: Tensor | None) -> float:
    return 1.0 if uncond_output is None else GUIDANCE_SCALE


def denoise_step(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    schedule: Schedule,
    step: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    return loopfast_kernels.denoise_step(
        model_output,
        sample,
        schedule.table,
        step,
        seed,
        uncond_output=uncond_output,
        guidance_scale=_scale(uncond_output),
    )


def transition_logprob(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    prev_sample: Tensor,
    schedule: Schedule,
    step: Tensor,
) -> Tensor:
    return loopfast_kernels.transition_logprob(
        model_output,
        sample,
        prev_sample,
        schedule.table,
        step,
        uncond_output=uncond_output,
        guidance_scale=_scale(uncond_output),
    )


def clipped_loss(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    prev_sample: Tensor,
    schedule: Schedule,
    step: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
) -> Tensor:
    return loopfast_kernels.clipped_loss(
        model_output,
        sample,
        prev_sample,
        schedule.table,
        step,
        old_logprob,
        advantage,
        clip_range=CLIP_RANGE,
        uncond_output=uncond_output,
        guidance_scale=_scale(uncond_output),
    ).loss


def loop_loss(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    prev_sample: Tensor,
    schedule: Schedule,
    step: Tensor,
    old_logprob: Tensor,
    rewards: Tensor,
    trajectory: Tensor,
) -> Tensor:
    return loopfast_kernels.loop_loss(
        model_output,
        sample,
        prev_sample,
        schedule.table,
        step,
        old_logprob,
        rewards,
        trajectory,
        clip_range=CLIP_RANGE,
        advantage_clip=ADVANTAGE_CLIP,
        uncond_output=uncond_output,
        guidance_scale=_scale(uncond_output),
    ).loss


def leave_one_out(rewards: Tensor) -> Tensor:
    return loopfast_kernels.leave_one_out(rewards)


def philox_normal(sample: Tensor, step: Tensor, seed: Tensor) -> Tensor:
    return loopfast_kernels.philox_normal(seed, step, sample.shape)
