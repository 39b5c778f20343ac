"""One sampling step in the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers import empty_like
from ..native_library import Latents, as_float32, call, latents, pointer, transition
from ..validation import check_index


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
    """``x_{t-1}`` and its log-probability; as in `reference`."""
    table = as_float32(table)
    prev_sample = empty_like(sample)
    logprob = sample.new_empty(sample.shape[0], dtype=torch.float32)
    at = transition(model_output, sample, table, step, uncond_output, guidance_scale, reduction)
    call(
        "loopfast_denoise_step",
        at,
        pointer("seed", seed),
        latents("prev_sample", prev_sample),
        Latents(None, 0),
        0,
        logprob.data_ptr(),
    )
    return prev_sample, logprob


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
    """The in-place form; as in `reference`."""
    check_index("step", step, table.shape[0])
    index = int(step)
    table = as_float32(table)
    at = transition(model_output, trajectory[index], table, step, uncond_output, guidance_scale, reduction)
    at.step_stride = 0
    call(
        "loopfast_denoise_step",
        at,
        pointer("seed", seed),
        latents("trajectory", trajectory[index + 1]),
        latents("model_input", model_input),
        model_input.shape[0] // trajectory.shape[1],
        logprob[index].data_ptr(),
    )
    step.add_(1)
