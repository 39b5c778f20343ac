"""The Gaussian transition and its log-probability in plain torch.

Everything here works on rows: latents are flattened to ``[N, E]`` in the dtype of the arithmetic,
coefficients are ``[N, 1]``. Every result comes from elementwise operations and `row_sum`, so that a row's bits
depend on nothing but the row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reduction import row_sum
from ..transition import Transition
from ..validation import check_index, check_table

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class Coefficients(NamedTuple):
    """The rows of the transition table that the samples are at, each ``[N, 1]``.

    Where ``sigma`` is 0 the step is deterministic: ``stochastic`` is False and ``slope`` 0, and
    ``inverse_sigma`` is 1.
    """

    a: Tensor
    b: Tensor
    sigma: Tensor
    inverse_sigma: Tensor
    log_sigma: Tensor
    slope: Tensor
    stochastic: Tensor


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns float64 where one of the tensors has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def as_rows(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Flattens ``[N, *L]`` to ``[N, E]``."""
    return latents.flatten(1).to(dtype)


def gather_coefficients(table: Tensor, step: Tensor, dtype: torch.dtype) -> Coefficients:
    """Looks up each row's coefficients.

    Args:
        table: ``[T, 3]``, columns a, b, sigma.
        step: int64 ``[N]``.
        dtype: the dtype of the arithmetic.

    Raises:
        ValueError: on the CPU, a step lies outside the table or a sigma is negative.
    """
    check_index("step", step, table.shape[0])
    check_table(table)
    a, b, sigma = table.to(dtype).unbind(1)
    stochastic = sigma > 0
    divisor = torch.where(stochastic, sigma, 1.0)
    # The logarithms are those of the table, not of the gathered rows: the same T numbers whatever N is.
    slope = torch.where(stochastic, b / divisor, 0.0)
    columns = torch.stack((a, b, sigma, 1.0 / divisor, divisor.log(), slope), dim=1)
    a, b, sigma, inverse_sigma, log_sigma, slope = columns.index_select(0, step)[:, :, None].unbind(1)
    return Coefficients(
        a, b, sigma, inverse_sigma, log_sigma, slope, stochastic.index_select(0, step)[:, None]
    )


def guided_output(transition: Transition, dtype: torch.dtype) -> Tensor:
    """Returns classifier-free guidance's ``m = u + g (c - u)`` as rows ``[N, E]``."""
    conditional = as_rows(transition.model_output, dtype)
    if transition.uncond_output is None:
        return conditional
    unconditional = as_rows(transition.uncond_output, dtype)
    return unconditional + transition.guidance_scale * (conditional - unconditional)


def distribution(transition: Transition) -> tuple[Coefficients, Tensor, Tensor]:
    """Returns the rows' coefficients, the guided output ``m`` and the mean ``a x_t + b m``, both ``[N, E]``."""
    dtype = arithmetic_dtype(transition.model_output, transition.sample)
    at = gather_coefficients(transition.table, transition.step, dtype)
    output = guided_output(transition, dtype)
    return at, output, at.a * as_rows(transition.sample, dtype) + at.b * output


def standardized(prev_sample: Tensor, mean: Tensor, at: Coefficients) -> Tensor:
    """Returns the residuals ``(x_{t-1} - a x_t - b m) / sigma``, ``[N, E]``."""
    return (as_rows(prev_sample, mean.dtype) - mean) * at.inverse_sigma


def row_reduce(values: Tensor, reduction: str) -> Tensor:
    """Returns the sum or mean of each row, ``[N]`` from ``[N, E]``."""
    total = row_sum(values)
    return (total if reduction == "sum" else total / values.shape[1]).to(values.dtype)


def gaussian_logprob(at: Coefficients, residual: Tensor, reduction: str) -> Tensor:
    """Returns the log-density of standardized residuals.

    Args:
        at: the rows' coefficients.
        residual: ``(x_{t-1} - a x_t - b m) / sigma``, ``[N, E]``.
        reduction: ``"sum"`` or ``"mean"`` over the elements.

    Returns:
        ``[N]``; 0 where the step is deterministic.
    """
    elements = residual.shape[1] if reduction == "sum" else 1
    constant = (at.log_sigma[:, 0] + HALF_LOG_TWO_PI) * elements
    logprob = row_reduce(residual * residual, reduction) * -0.5 - constant
    return torch.where(at.stochastic[:, 0], logprob, 0.0)


def transition_logprob(transition: Transition, prev_sample: Tensor, reduction: str) -> Tensor:
    """Returns the log-probability ``[N]``; the arguments are those of `loopfast_kernels.transition_logprob`."""
    at, _, mean = distribution(transition)
    return gaussian_logprob(at, standardized(prev_sample, mean, at), reduction)


def transition_logprob_backward(
    grad: Tensor, transition: Transition, prev_sample: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by both model outputs: ``dlogp/dm = (b / sigma) residual``, over E for the mean.

    Args:
        grad: ``[N]``, by the log-probability.
        transition: as in the forward pass, like the other arguments.
        prev_sample: ``[N, *L]``.
        reduction: ``"sum"`` or ``"mean"``.

    Returns:
        The gradient by ``model_output`` and that by ``uncond_output``; the second is empty without ``uncond_output``.
    """
    at, _, mean = distribution(transition)
    residual = standardized(prev_sample, mean, at)
    elements = residual.shape[1] if reduction == "mean" else 1
    slope = grad.to(mean.dtype)[:, None] * at.slope / elements * residual
    output, uncond, scale = transition.model_output, transition.uncond_output, transition.guidance_scale
    if uncond is None:
        return slope.reshape(output.shape).to(output.dtype), output.new_empty(0)
    return (
        (slope * scale).reshape(output.shape).to(output.dtype),
        (slope * (1.0 - scale)).reshape(uncond.shape).to(uncond.dtype),
    )
