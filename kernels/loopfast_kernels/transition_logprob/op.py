"""Registration of ``loopfast::transition_logprob`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..validation import check_transition
from . import reference

_FORWARD = {"reference": reference.transition_logprob}
_BACKWARD = {"reference": reference.transition_logprob_backward}

_ARGUMENTS = (
    "Tensor model_output, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, "
    "Tensor? uncond_output, float guidance_scale, str reduction"
)


@torch.library.custom_op("loopfast::transition_logprob", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _transition_logprob(*arguments: Any) -> Tensor:
    return backends.choose(_FORWARD)(*arguments)


@_transition_logprob.register_fake
def _(model_output: Tensor, sample: Tensor, *_: Any) -> Tensor:
    dtype = reference.arithmetic_dtype(model_output, sample)
    return model_output.new_empty(model_output.shape[0], dtype=dtype)


@torch.library.custom_op(
    "loopfast::transition_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def _transition_logprob_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return backends.choose(_BACKWARD)(*arguments)


@_transition_logprob_backward.register_fake
def _(
    grad: Tensor,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_output: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(model_output),
        model_output.new_empty(0) if uncond_output is None else torch.empty_like(uncond_output),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.guidance_scale, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grad_output, grad_uncond = _transition_logprob_backward(grad, *tensors, ctx.guidance_scale, ctx.reduction)
    uncond_output = tensors[-1]
    return grad_output, None, None, None, None, None if uncond_output is None else grad_uncond, None, None


_transition_logprob.register_autograd(_backward, setup_context=_setup_context)


def transition_logprob(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Log-probability of the step from ``x_t`` to ``x_{t-1}``.

    The transition is ``N(a x_t + b m, sigma^2)`` with ``m = u + g (c - u)``; its log-density is summed or
    averaged over a row's elements. The mean is the convention of DDPO (Black et al., 2023), the sum is the
    density.

    Args:
        model_output: ``[N, *L]``, float32, float16, bfloat16 or float64; the conditional output ``c``.
        sample: ``[N, *L]``, ``x_t``.
        prev_sample: ``[N, *L]``, ``x_{t-1}``.
        table: float32 (or float64) ``[T, 3]``, columns a, b, sigma of every step.
        step: int64 ``[N]``, the row of `table` each sample is at.
        uncond_output: ``[N, *L]``, the unconditional output ``u``.
        guidance_scale: ``g``; other than 1 it needs `uncond_output`.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        float32 ``[N]`` (float64 for float64 inputs), differentiable in `model_output` and `uncond_output`;
        the samples count as data. 0, with no gradient, where sigma is 0.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or value; on the CPU also a step outside the table.
    """
    latents = {"sample": sample, "prev_sample": prev_sample, "uncond_output": uncond_output}
    check_transition(model_output, latents, table, step, guidance_scale, reduction)
    result: Tensor = _transition_logprob(
        model_output.contiguous(),
        sample.contiguous(),
        prev_sample.contiguous(),
        table.contiguous(),
        step.contiguous(),
        None if uncond_output is None else uncond_output.contiguous(),
        float(guidance_scale),
        reduction,
    )
    return result
