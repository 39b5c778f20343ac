"""The formulas as DDPO writes them (ddpo-pytorch's ``ddim_step_with_logprob``, TRL 0.23.1's ``scheduler_step``
and ``DDPOTrainer``), made as fast as eager torch allows.

Unlike in the originals, the schedule is on the device, its coefficients are ``[N, 1, 1, 1]`` and not expanded to the
latent, and statistics that are only logged are not computed. ``torch.compile`` gets the same functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cases import ADVANTAGE_CLIP, CLIP_RANGE, GUIDANCE_SCALE, Schedule


def _guided(model_output: Tensor, uncond_output: Tensor) -> Tensor:
    return uncond_output + GUIDANCE_SCALE * (model_output - uncond_output)


def _mean_and_sigma(
    model_output: Tensor, sample: Tensor, schedule: Schedule, step: Tensor
) -> tuple[Tensor, Tensor]:
    rows = schedule.alphas[step].reshape(-1, *(1 for _ in sample.shape[1:]), 3)
    alpha, alpha_prev, sigma = rows.unbind(-1)
    original = (sample - (1 - alpha) ** 0.5 * model_output) / alpha**0.5
    direction = (1 - alpha_prev - sigma**2) ** 0.5 * model_output
    return alpha_prev**0.5 * original + direction, sigma


def _log_prob(prev_sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    log_prob = (
        -((prev_sample.detach() - mean) ** 2) / (2 * sigma**2)
        - torch.log(sigma)
        - 0.5 * math.log(2 * math.pi)
    )
    return log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def denoise_step(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    schedule: Schedule,
    step: Tensor,
    seed: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes a step and returns its log-probability. The noise is from torch's generator; `seed` is not used."""
    if uncond_output is not None:
        model_output = _guided(model_output, uncond_output)
    mean, sigma = _mean_and_sigma(model_output, sample, schedule, step)
    if noise is None:
        noise = torch.randn(sample.shape, dtype=model_output.dtype, device=sample.device)
    prev_sample = mean + sigma * noise
    return prev_sample.to(sample.dtype), _log_prob(prev_sample, mean, sigma)


def transition_logprob(
    model_output: Tensor,
    uncond_output: Tensor | None,
    sample: Tensor,
    prev_sample: Tensor,
    schedule: Schedule,
    step: Tensor,
) -> Tensor:
    guided = model_output if uncond_output is None else _guided(model_output, uncond_output)
    return _log_prob(prev_sample, *_mean_and_sigma(guided, sample, schedule, step))


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
    ratio = torch.exp(log_prob - old_logprob)
    unclipped = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
    return torch.mean(torch.maximum(unclipped, clipped))


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
    advantage = leave_one_out(rewards).flatten()[trajectory].clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    return clipped_loss(
        model_output, uncond_output, sample, prev_sample, schedule, step, old_logprob, advantage
    )


def leave_one_out(rewards: Tensor) -> Tensor:
    others = rewards.sum(-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[-1] - 1)


def philox_normal(sample: Tensor, step: Tensor, seed: Tensor) -> Tensor:
    """Draws noise from torch's generator: the cost of noise that cannot be reproduced from a seed and a step."""
    return torch.randn(sample.shape, dtype=torch.float32, device=sample.device)
