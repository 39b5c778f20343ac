"""Registration of ``loopfast::transition_logprob`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..registration import Operator, select
from ..transition import Transition
from ..validation import check_transition
from . import reference

_FORWARD = backends.Implementations(__package__, "transition_logprob")
_BACKWARD = backends.Implementations(__package__, "transition_logprob_backward")

_ARGUMENTS = (
    "Tensor model_output, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, "
    "Tensor? uncond_output, float guidance_scale, str reduction"
)


class _TransitionLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.guidance_scale, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)
        result: Tensor = _transition_logprob.below_autograd(*inputs)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, uncond_output = ctx.saved_tensors
        grad_output, grad_uncond = _transition_logprob_backward(
            grad.contiguous(), *tensors, uncond_output, ctx.guidance_scale, ctx.reduction
        )
        return grad_output, None, None, None, None, None if uncond_output is None else grad_uncond, None, None


def _choose(implementations: backends.Implementations, arguments: Any) -> Any:
    return implementations.choose(
        arguments.model_output, arguments.sample, arguments.prev_sample, arguments.uncond_output
    )


def _fake(arguments: Any) -> Tensor:
    output: Tensor = arguments.model_output
    return output.new_empty(output.shape[0], dtype=reference.arithmetic_dtype(output, arguments.sample))


def _fake_backward(arguments: Any) -> tuple[Tensor, Tensor]:
    output, uncond_output = arguments.model_output, arguments.uncond_output
    return (
        torch.empty_like(output),
        output.new_empty(0) if uncond_output is None else torch.empty_like(uncond_output),
    )


_transition_logprob = Operator(
    f"transition_logprob({_ARGUMENTS}) -> Tensor",
    lambda arguments: _choose(_FORWARD, arguments)(
        select(Transition, arguments), arguments.prev_sample, arguments.reduction
    ),
    _fake,
    _TransitionLogprob,
)
_transition_logprob_backward = Operator(
    f"transition_logprob_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda arguments: _choose(_BACKWARD, arguments)(
        arguments.grad, select(Transition, arguments), arguments.prev_sample, arguments.reduction
    ),
    _fake_backward,
)


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
    """Returns the log-probability of the step from ``x_t`` to ``x_{t-1}``.

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
        guidance_scale: ``g``; a value other than 1 needs `uncond_output`.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        float32 ``[N]`` (float64 for float64 inputs), differentiable in `model_output` and `uncond_output`;
        the samples count as data. A row whose sigma is 0 has log-probability 0 and no gradient.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or value; on the CPU also a step outside the table.
    """
    latents = {"sample": sample, "prev_sample": prev_sample, "uncond_output": uncond_output}
    check_transition(model_output, latents, table, step, guidance_scale, reduction)
    result: Tensor = _transition_logprob(
        model_output, sample, prev_sample, table, step, uncond_output, float(guidance_scale), reduction
    )
    return result
