"""The Gaussian transition and its log-probability in plain torch.

Everything here works on rows: latents are flattened to ``[N, E]`` in the dtype of the arithmetic,
coefficients are ``[N, 1]``. Each result is put together from elementwise operations and `row_sum`, so that a
row's bits depend on nothing but the row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reduction import row_sum
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
    """Float32 whatever the inputs, but float64 where one of them is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def as_rows(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Flatten ``[N, *L]`` to ``[N, E]``."""
    return latents.flatten(1).to(dtype)


def gather_coefficients(table: Tensor, step: Tensor, dtype: torch.dtype) -> Coefficients:
    """Look up each row's coefficients.

    Args:
        table: ``[T, 3]``, columns a, b, sigma.
        step: int64 ``[N]``.
        dtype: of the arithmetic.

    Raises:
        ValueError: on the CPU, a step lies outside the table or a sigma is negative.
    """
    check_index("step", step, table.shape[0])
    check_table(table)
    a, b, sigma = table.to(dtype).unbind(1)
    stochastic = sigma > 0
    divisor = torch.where(stochastic, sigma, 1.0)
    # The logarithm is taken of the table, not of the gathered rows: the same T numbers whatever N is.
    slope = torch.where(stochastic, b / divisor, 0.0)
    columns = torch.stack((a, b, sigma, 1.0 / divisor, divisor.log(), slope), dim=1)
    a, b, sigma, inverse_sigma, log_sigma, slope = columns.index_select(0, step)[:, :, None].unbind(1)
    return Coefficients(
        a, b, sigma, inverse_sigma, log_sigma, slope, stochastic.index_select(0, step)[:, None]
    )


def guided_output(
    model_output: Tensor, uncond_output: Tensor | None, guidance_scale: float, dtype: torch.dtype
) -> Tensor:
    """Classifier-free guidance, ``u + g (c - u)``, as rows ``[N, E]``."""
    conditional = as_rows(model_output, dtype)
    if uncond_output is None:
        return conditional
    unconditional = as_rows(uncond_output, dtype)
    return unconditional + guidance_scale * (conditional - unconditional)


def transition_mean(at: Coefficients, sample: Tensor, output: Tensor) -> Tensor:
    """``a x_t + b m`` for rows ``[N, E]``."""
    return at.a * sample + at.b * output


def row_reduce(values: Tensor, reduction: str) -> Tensor:
    """Sum or mean of each row: ``[N, E]`` to ``[N]``."""
    total = row_sum(values)
    return (total if reduction == "sum" else total / values.shape[1]).to(values.dtype)


def gaussian_logprob(at: Coefficients, residual: Tensor, reduction: str) -> Tensor:
    """Log-density of standardized residuals.

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
    """Log-probability ``[N]``; the arguments are those of `loopfast_kernels.transition_logprob`."""
    dtype = arithmetic_dtype(model_output, sample)
    at = gather_coefficients(table, step, dtype)
    output = guided_output(model_output, uncond_output, guidance_scale, dtype)
    mean = transition_mean(at, as_rows(sample, dtype), output)
    residual = (as_rows(prev_sample, dtype) - mean) * at.inverse_sigma
    return gaussian_logprob(at, residual, reduction)


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
    """Gradients with respect to both model outputs: ``dlogp/dm = (b / sigma) residual``, over E for the mean.

    Args:
        grad: ``[N]``, of the log-probability; the others as in the forward pass.

    Returns:
        Gradient of ``model_output`` and of ``uncond_output``; the second is empty where there is none.
    """
    dtype = arithmetic_dtype(model_output, sample)
    at = gather_coefficients(table, step, dtype)
    output = guided_output(model_output, uncond_output, guidance_scale, dtype)
    mean = transition_mean(at, as_rows(sample, dtype), output)
    residual = (as_rows(prev_sample, dtype) - mean) * at.inverse_sigma
    elements = residual.shape[1] if reduction == "mean" else 1
    slope = grad.to(dtype)[:, None] * at.slope / elements * residual
    if uncond_output is None:
        return slope.reshape(model_output.shape).to(model_output.dtype), model_output.new_empty(0)
    return (
        (slope * guidance_scale).reshape(model_output.shape).to(model_output.dtype),
        (slope * (1.0 - guidance_scale)).reshape(uncond_output.shape).to(uncond_output.dtype),
    )
