"""The log-probability of a transition and its gradients in the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers import empty_like
from ..native_library import as_float32, call, latents, pointer, transition_struct
from ..transition import Transition


def transition_logprob(transition: Transition, prev_sample: Tensor, reduction: str) -> Tensor:
    """Returns the log-probability ``[N]``, as `reference` does."""
    rows = transition.model_output.shape[0]
    logprob = transition.model_output.new_empty(rows, dtype=torch.float32)
    call(
        "loopfast_transition_logprob",
        transition_struct(transition, reduction),
        latents("prev_sample", prev_sample),
        logprob.data_ptr(),
    )
    return logprob


def transition_logprob_backward(
    grad: Tensor, transition: Transition, prev_sample: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by both model outputs, as `reference` does."""
    grad = as_float32(grad)
    output, uncond = transition.model_output, transition.uncond_output
    grad_output = empty_like(output)
    grad_uncond = output.new_empty(0) if uncond is None else empty_like(uncond)
    call(
        "loopfast_transition_logprob_backward",
        transition_struct(transition, reduction),
        latents("prev_sample", prev_sample),
        pointer("grad", grad),
        latents("grad_output", grad_output),
        latents("grad_uncond", grad_uncond),
    )
    return grad_output, grad_uncond
