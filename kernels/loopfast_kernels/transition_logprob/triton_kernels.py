"""The Gaussian transition and its log-probability on a GPU.

The device functions here are shared by all ops that score a transition: the same operations in the same order
give the same bits.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    blocks,
    fold,
    launch,
    load_latents,
    shared_row,
    shorten,
    store_latents,
    tile_offsets,
    total,
    whole_row,
)
from ..validation import check_index

_HALF_LOG_TWO_PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))


@triton.jit
def load_coefficients(table, at):
    """``a``, ``b``, ``sigma`` of one step and what follows from them.

    Returns:
        ``a, b, sigma``, the factor that standardizes a residual, and the slope ``b / sigma`` (0 where the step is
        deterministic).
    """
    a = tl.load(table + at * 3)
    b = tl.load(table + at * 3 + 1)
    sigma = tl.load(table + at * 3 + 2)
    divisor = tl.where(sigma > 0.0, sigma, 1.0)
    slope = tl.where(sigma > 0.0, tl.div_rn(b, divisor), 0.0)
    return a, b, sigma, tl.div_rn(1.0, divisor), slope


@triton.jit
def load_output(output, uncond_output, guidance_scale, start, offsets, elements, full: tl.constexpr):
    """The guided output ``u + g (c - u)``; without ``u``, the output."""
    guided = load_latents(output, start, offsets, elements, full)
    if uncond_output is not None:
        uncond = load_latents(uncond_output, start, offsets, elements, full)
        guided = uncond + guidance_scale * (guided - uncond)
    return guided


@triton.jit
def standardized(prev_sample, sample, output, a, b, inverse):
    """``(x_{t-1} - (a x_t + b m)) / sigma``."""
    return (prev_sample - (a * sample + b * output)) * inverse


@triton.jit
def gaussian_logprob(squares, sigma, divisor, constants):
    """Log-density from a row's sum of squared residuals; 0 where the step is deterministic.

    ``divisor`` and ``constants`` are E and 1 for the mean over elements, 1 and E for the sum.
    """
    log_sigma = tl.log(tl.where(sigma > 0.0, sigma, 1.0))
    logprob = tl.div_rn(squares, divisor) * -0.5 - (log_sigma + _HALF_LOG_TWO_PI) * constants
    return tl.where(sigma > 0.0, logprob, 0.0)


def reduction_factors(elements: int, reduction: str) -> tuple[float, float]:
    """``divisor`` and ``constants`` of `gaussian_logprob`."""
    return (float(elements), 1.0) if reduction == "mean" else (1.0, float(elements))


@triton.jit
def store_partials(
    partials, row, program, values, padded: tl.constexpr, height: tl.constexpr, width: tl.constexpr
):
    """Fold a tile to one value a column and store them at their place in ``[N, padded / height]``."""
    columns = row * (padded // height) + program * width + tl.arange(0, width)
    tl.store(partials + columns, fold(tl.reshape(values, (height * width,)), height * width, width))


@triton.jit
def transition_logprob_kernel(
    logprob,
    partials,
    model_output,
    sample,
    prev_sample,
    table,
    step,
    uncond_output,
    guidance_scale,
    divisor,
    constants,
    elements,
    padded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    full: tl.constexpr,
):
    """Score a row, or a tile of it where there are ``partials``."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    a, b, sigma, inverse, _ = load_coefficients(table, tl.load(step + row))
    start = row * elements
    offsets = tile_offsets(program, padded, height, width)
    output = load_output(model_output, uncond_output, guidance_scale, start, offsets, elements, full)
    x = load_latents(sample, start, offsets, elements, full)
    prev = load_latents(prev_sample, start, offsets, elements, full)
    residual = standardized(prev, x, output, a, b, inverse)
    if partials is None:
        squares = total(tl.reshape(residual * residual, (padded,)), padded)
        tl.store(logprob + row, gaussian_logprob(squares, sigma, divisor, constants))
    else:
        store_partials(partials, row, program, residual * residual, padded, height, width)


@triton.jit
def score_kernel(logprob, partials, table, step, divisor, constants, columns: tl.constexpr):
    """Log-probability of a row from the partial sums of its programs."""
    row = tl.program_id(0).to(tl.int64)
    squares = total(tl.load(partials + row * columns + tl.arange(0, columns)), columns)
    sigma = tl.load(table + tl.load(step + row) * 3 + 2)
    tl.store(logprob + row, gaussian_logprob(squares, sigma, divisor, constants))


def score(
    logprob: Tensor, partials: Tensor, table: Tensor, step: Tensor, divisor: float, constants: float
) -> None:
    """Fill `logprob` ``[N]`` from partial sums ``[N, columns]``."""
    partials = shorten(partials)
    rows, columns = partials.shape
    num_warps = whole_row(columns).num_warps
    launch(
        score_kernel,
        (rows,),
        logprob,
        partials,
        table,
        step,
        divisor,
        constants,
        columns=columns,
        num_warps=num_warps,
    )


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
    check_index("step", step, table.shape[0])
    table = table.float()
    rows = model_output.shape[0]
    elements = model_output[0].numel()
    cut = shared_row(elements)
    factors = reduction_factors(elements, reduction)
    logprob = torch.empty(rows, dtype=torch.float32, device=model_output.device)
    partials = None if cut.programs == 1 else logprob.new_empty(rows, cut.columns)
    launch(
        transition_logprob_kernel,
        (rows, cut.programs),
        logprob,
        partials,
        model_output,
        sample,
        prev_sample,
        table,
        step,
        uncond_output,
        guidance_scale,
        *factors,
        elements,
        padded=cut.padded,
        height=cut.height,
        width=cut.width,
        full=elements == cut.padded,
        num_warps=cut.num_warps,
    )
    if partials is not None:
        score(logprob, partials, table, step, *factors)
    return logprob


@triton.jit
def transition_logprob_backward_kernel(
    grad_output,
    grad_uncond,
    grad,
    grad_stride,
    model_output,
    sample,
    prev_sample,
    table,
    step,
    uncond_output,
    guidance_scale,
    uncond_scale,
    divisor,
    elements,
    block: tl.constexpr,
    full: tl.constexpr,
):
    """Gradients of a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    a, b, _, inverse, slope = load_coefficients(table, tl.load(step + row))
    start = row * elements
    offsets = tile_offsets(tl.program_id(1), block, 1, block)
    output = load_output(model_output, uncond_output, guidance_scale, start, offsets, elements, full)
    x = load_latents(sample, start, offsets, elements, full)
    prev = load_latents(prev_sample, start, offsets, elements, full)
    weight = tl.div_rn(tl.load(grad + row * grad_stride) * slope, divisor)
    by_output = weight * standardized(prev, x, output, a, b, inverse)
    if uncond_output is None:
        store_latents(grad_output, start, offsets, elements, by_output, full)
    else:
        store_latents(grad_output, start, offsets, elements, by_output * guidance_scale, full)
        store_latents(grad_uncond, start, offsets, elements, by_output * uncond_scale, full)


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
    """Gradients with respect to both model outputs; the second is empty where there is none."""
    check_index("step", step, table.shape[0])
    rows = model_output.shape[0]
    elements = model_output[0].numel()
    block, count, num_warps = blocks(elements)
    grad = grad.float()
    divisor, _ = reduction_factors(elements, reduction)
    grad_output = torch.empty_like(model_output)
    grad_uncond = model_output.new_empty(0) if uncond_output is None else torch.empty_like(uncond_output)
    launch(
        transition_logprob_backward_kernel,
        (rows, count),
        grad_output,
        None if uncond_output is None else grad_uncond,
        grad,
        grad.stride(0),
        model_output,
        sample,
        prev_sample,
        table.float(),
        step,
        uncond_output,
        guidance_scale,
        1.0 - guidance_scale,
        divisor,
        elements,
        block=block,
        full=elements % block == 0,
        num_warps=num_warps,
    )
    return grad_output, grad_uncond
