"""One sampling step in the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers import empty_like
from ..native_library import Latents, call, latents, pointer, transition_struct
from ..transition import Transition
from ..validation import check_index


def denoise_step(transition: Transition, seed: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Returns ``x_{t-1}`` and its log-probability, as `reference` does."""
    prev_sample = empty_like(transition.sample)
    logprob = prev_sample.new_empty(prev_sample.shape[0], dtype=torch.float32)
    call(
        "loopfast_denoise_step",
        transition_struct(transition, reduction),
        pointer("seed", seed),
        latents("prev_sample", prev_sample),
        Latents(None, 0),
        0,
        logprob.data_ptr(),
    )
    return prev_sample, logprob


def denoise_step_(
    transition: Transition, logprob: Tensor, model_input: Tensor, seed: Tensor, reduction: str
) -> None:
    """Takes the step in place, as `reference` does."""
    check_index("step", transition.step, transition.table.shape[0])
    index, trajectory = int(transition.step), transition.sample
    struct = transition_struct(transition._replace(sample=trajectory[index]), reduction)
    struct.step_stride = 0
    call(
        "loopfast_denoise_step",
        struct,
        pointer("seed", seed),
        latents("trajectory", trajectory[index + 1]),
        latents("model_input", model_input),
        model_input.shape[0] // trajectory.shape[1],
        logprob[index].data_ptr(),
    )
    transition.step.add_(1)
