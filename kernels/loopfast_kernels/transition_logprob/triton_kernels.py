"""The Gaussian transition and its log-probability on a GPU.

All ops that score a transition share the device functions here: the same operations in the same order give the same
bits. A comment beside a pointer has its shape, where ``E`` is the number of elements of a row.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transition import Transition
from ..triton_common import (
    blocks,
    launch,
    load_latents,
    shared_row,
    shorten,
    store_latents,
    store_partials,
    tile_offsets,
    total,
    whole_row,
)
from ..validation import check_index

_HALF_LOG_TWO_PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))


class Reduction(NamedTuple):
    """The factors of a row's log-probability: E and 1 for the mean over elements, 1 and E for the sum."""

    divisor: float
    constants: float


def reduction_factors(elements: int, reduction: str) -> Reduction:
    """Returns the factors for ``"mean"`` or ``"sum"``."""
    return Reduction(float(elements), 1.0) if reduction == "mean" else Reduction(1.0, float(elements))


@triton.jit
def load_coefficients(
    table,  # float32 [T, 3]
    at,
):
    """Returns ``a``, ``b`` and ``sigma`` of one step, ``1 / sigma`` and the slope ``b / sigma``.

    Where the step is deterministic, the last two are 1 and 0.
    """
    a = tl.load(table + at * 3)
    b = tl.load(table + at * 3 + 1)
    sigma = tl.load(table + at * 3 + 2)
    divisor = tl.where(sigma > 0.0, sigma, 1.0)
    slope = tl.where(sigma > 0.0, tl.div_rn(b, divisor), 0.0)
    return a, b, sigma, tl.div_rn(1.0, divisor), slope


@triton.jit
def load_output(transition, start, offsets, elements, TILE: tl.constexpr):
    """Returns a tile of the guided output ``u + g (c - u)``; without ``u``, of the output."""
    guided = load_latents(transition.model_output, start, offsets, elements, TILE)
    if transition.uncond_output is not None:
        uncond = load_latents(transition.uncond_output, start, offsets, elements, TILE)
        guided = uncond + transition.guidance_scale * (guided - uncond)
    return guided


@triton.jit
def standardized(prev_sample, sample, output, a, b, inverse_sigma):
    """Returns ``(x_{t-1} - (a x_t + b m)) / sigma``."""
    return (prev_sample - (a * sample + b * output)) * inverse_sigma


@triton.jit
def gaussian_logprob(squares, sigma, reduction):
    """Returns the log-density from a row's sum of squared residuals; 0 where the step is deterministic."""
    log_sigma = tl.log(tl.where(sigma > 0.0, sigma, 1.0))
    halved = tl.div_rn(squares, reduction.divisor) * -0.5
    logprob = halved - (log_sigma + _HALF_LOG_TWO_PI) * reduction.constants
    return tl.where(sigma > 0.0, logprob, 0.0)


@triton.jit
def transition_logprob_kernel(
    logprob,  # float32 [N]
    partials,  # float32 [N, columns], or None where one program takes a row
    transition,  # Transition
    prev_sample,  # [N, E]
    reduction,  # Reduction
    elements,
    TILE: tl.constexpr,
):
    """Scores a row, or leaves the partial sums of a tile."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    a, b, sigma, inverse_sigma, _ = load_coefficients(transition.table, tl.load(transition.step + row))
    start = row * elements
    offsets = tile_offsets(program, TILE)
    output = load_output(transition, start, offsets, elements, TILE)
    sample = load_latents(transition.sample, start, offsets, elements, TILE)
    prev = load_latents(prev_sample, start, offsets, elements, TILE)
    residual = standardized(prev, sample, output, a, b, inverse_sigma)
    if partials is None:
        squares = total(tl.reshape(residual * residual, (TILE.padded,)), TILE.padded)
        tl.store(logprob + row, gaussian_logprob(squares, sigma, reduction))
    else:
        store_partials(partials, row, program, residual * residual, TILE)


@triton.jit
def score_kernel(
    logprob,  # float32 [N]
    partials,  # float32 [N, COLUMNS]
    table,  # float32 [T, 3]
    step,  # int64 [N]
    reduction,  # Reduction
    COLUMNS: tl.constexpr,
):
    """Scores a row from its partial sums."""
    row = tl.program_id(0).to(tl.int64)
    squares = total(tl.load(partials + row * COLUMNS + tl.arange(0, COLUMNS)), COLUMNS)
    sigma = tl.load(table + tl.load(step + row) * 3 + 2)
    tl.store(logprob + row, gaussian_logprob(squares, sigma, reduction))


def score(logprob: Tensor, partials: Tensor, transition: Transition, reduction: Reduction) -> None:
    """Fills `logprob` ``[N]`` from partial sums ``[N, columns]``."""
    partials = shorten(partials)
    rows, columns = partials.shape
    launch(
        score_kernel,
        (rows,),
        logprob,
        partials,
        transition.table,
        transition.step,
        reduction,
        COLUMNS=columns,
        num_warps=whole_row(columns).num_warps,
    )


def transition_logprob(transition: Transition, prev_sample: Tensor, reduction: str) -> Tensor:
    """Returns the log-probability ``[N]``, as `reference` does."""
    check_index("step", transition.step, transition.table.shape[0])
    transition = transition._replace(table=transition.table.float())
    rows, elements = prev_sample.shape[0], prev_sample[0].numel()
    cut = shared_row(elements)
    factors = reduction_factors(elements, reduction)
    logprob = torch.empty(rows, dtype=torch.float32, device=prev_sample.device)
    partials = None if cut.programs == 1 else logprob.new_empty(rows, cut.columns)
    launch(
        transition_logprob_kernel,
        (rows, cut.programs),
        logprob,
        partials,
        transition,
        prev_sample,
        factors,
        elements,
        TILE=cut.tile,
        num_warps=cut.num_warps,
    )
    if partials is not None:
        score(logprob, partials, transition, factors)
    return logprob


@triton.jit
def transition_logprob_backward_kernel(
    grad_output,  # [N, E]
    grad_uncond,  # [N, E] or None
    grad,  # float32 [N]
    grad_stride,
    transition,  # Transition
    prev_sample,  # [N, E]
    uncond_scale,
    divisor,
    elements,
    TILE: tl.constexpr,
):
    """Writes the gradients of a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    a, b, _, inverse_sigma, slope = load_coefficients(transition.table, tl.load(transition.step + row))
    start = row * elements
    offsets = tile_offsets(tl.program_id(1), TILE)
    output = load_output(transition, start, offsets, elements, TILE)
    sample = load_latents(transition.sample, start, offsets, elements, TILE)
    prev = load_latents(prev_sample, start, offsets, elements, TILE)
    weight = tl.div_rn(tl.load(grad + row * grad_stride) * slope, divisor)
    by_output = weight * standardized(prev, sample, output, a, b, inverse_sigma)
    if grad_uncond is None:
        store_latents(grad_output, start, offsets, elements, by_output, TILE)
    else:
        store_latents(grad_output, start, offsets, elements, by_output * transition.guidance_scale, TILE)
        store_latents(grad_uncond, start, offsets, elements, by_output * uncond_scale, TILE)


def transition_logprob_backward(
    grad: Tensor, transition: Transition, prev_sample: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by both model outputs, as `reference` does."""
    check_index("step", transition.step, transition.table.shape[0])
    grad, output, uncond = grad.float(), transition.model_output, transition.uncond_output
    rows, elements = output.shape[0], output[0].numel()
    grad_output = torch.empty_like(output)
    grad_uncond = None if uncond is None else torch.empty_like(uncond)
    tile, programs, num_warps = blocks(elements)
    launch(
        transition_logprob_backward_kernel,
        (rows, programs),
        grad_output,
        grad_uncond,
        grad,
        grad.stride(0),
        transition._replace(table=transition.table.float()),
        prev_sample,
        1.0 - transition.guidance_scale,
        reduction_factors(elements, reduction).divisor,
        elements,
        TILE=tile,
        num_warps=num_warps,
    )
    return grad_output, output.new_empty(0) if grad_uncond is None else grad_uncond
