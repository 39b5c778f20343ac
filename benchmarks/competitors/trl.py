"""TRL's own functions, called as its DDPO trainer and pipeline call them, host synchronizations included."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cases import ADVANTAGE_CLIP, CLIP_RANGE, GUIDANCE_SCALE, STEPS, Schedule
from . import MissingCompetitorError, eager

try:
    from diffusers import DDIMScheduler
    from trl import DDPOTrainer
    from trl.models.modeling_sd_base import scheduler_step
except ImportError as error:
    # The last TRL with a DDPO trainer.
    raise MissingCompetitorError("TRL 0.23 is not installed") from error


@lru_cache(maxsize=1)
def _scheduler() -> Any:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def _guided(model_output: Tensor, uncond_output: Tensor) -> Tensor:
    return uncond_output + GUIDANCE_SCALE * (model_output - uncond_output)


def denoise_step(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    schedule: Schedule,
    step: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    if uncond_output is not None:
        model_output = _guided(model_output, uncond_output)
    result = scheduler_step(_scheduler(), model_output, schedule.timesteps[step], sample, eta=1.0)
    return result.latents, result.log_probs


def transition_logprob(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    prev_sample: Tensor,
    schedule: Schedule,
    step: Tensor,
) -> Tensor:
    guided = model_output if uncond_output is None else _guided(model_output, uncond_output)
    timesteps = schedule.timesteps[step]
    return scheduler_step(_scheduler(), guided, timesteps, sample, eta=1.0, prev_sample=prev_sample).log_probs


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
    log_prob = transition_logprob(model_output, uncond_output, sample, prev_sample, schedule, step)
    # The method does not use its trainer.
    return DDPOTrainer.loss(None, advantage, CLIP_RANGE, torch.exp(log_prob - old_logprob))


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
    """Computes the trainer's loss with the advantages of LOOP, which TRL does not have."""
    advantage = eager.leave_one_out(rewards).flatten()[trajectory].clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    return clipped_loss(
        model_output, uncond_output, sample, prev_sample, schedule, step, old_logprob, advantage
    )
