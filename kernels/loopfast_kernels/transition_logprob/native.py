"""The log-probability of a transition and its gradients in the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers import empty_like
from ..native_library import as_float32, call, latents, pointer, transition


def transition_logprob(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reduction: str,
) -> Tensor:
    """Log-probability ``[N]``; as in `reference`."""
    table = as_float32(table)
    logprob = model_output.new_empty(model_output.shape[0], dtype=torch.float32)
    at = transition(model_output, sample, table, step, uncond_output, guidance_scale, reduction)
    call("loopfast_transition_logprob", at, latents("prev_sample", prev_sample), logprob.data_ptr())
    return logprob


def transition_logprob_backward(
    grad: Tensor,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Gradients by both model outputs, the second empty where there is none; as in `reference`."""
    table, grad = as_float32(table), as_float32(grad)
    grad_output = empty_like(model_output)
    grad_uncond = model_output.new_empty(0) if uncond_output is None else empty_like(uncond_output)
    at = transition(model_output, sample, table, step, uncond_output, guidance_scale, reduction)
    call(
        "loopfast_transition_logprob_backward",
        at,
        latents("prev_sample", prev_sample),
        pointer("grad", grad),
        latents("grad_output", grad_output),
        latents("grad_uncond", grad_uncond),
    )
    return grad_output, grad_uncond
