"""One sampling step on a GPU."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox.triton_kernels import normal_noise
from ..transition_logprob.triton_kernels import (
    gaussian_logprob,
    load_coefficients,
    load_output,
    reduction_factors,
    score,
    standardized,
    store_partials,
)
from ..triton_common import (
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


@triton.jit
def draw(
    prev_sample,
    to_start,
    sample,
    from_start,
    model_output,
    uncond_output,
    guidance_scale,
    start,
    table,
    at,
    seed,
    program,
    elements,
    padded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    full: tl.constexpr,
):
    """Sample a tile of a row and store it.

    Returns:
        The tile as it was rounded and the squares of its standardized residuals, both float32
        ``[height, width]``.
    """
    a, b, sigma, inverse, _ = load_coefficients(table, at)
    offsets = tile_offsets(program, padded, height, width)
    output = load_output(model_output, uncond_output, guidance_scale, start, offsets, elements, full)
    x = load_latents(sample, from_start, offsets, elements, full)
    # As many normals for a thread as it loads elements at once, so that they meet without an exchange.
    together: tl.constexpr = 128 // prev_sample.dtype.element_ty.primitive_bitwidth
    counter = tile_offsets(program, padded // together, height, width // together)
    noise = tl.reshape(normal_noise(seed, at, counter, together), (height, width))
    # Scored as it is stored: rounded.
    prev = (a * x + b * output + sigma * noise).to(prev_sample.dtype.element_ty)
    store_latents(prev_sample, to_start, offsets, elements, prev, full)
    prev = prev.to(tl.float32)
    residual = standardized(prev, x, output, a, b, inverse)
    if not full:
        residual = tl.where(offsets < elements, residual, 0.0)
    return prev, residual * residual


@triton.jit
def denoise_step_kernel(
    prev_sample,
    logprob,
    partials,
    model_output,
    sample,
    table,
    step,
    seed,
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
    """Sample and score a row, or a tile of it where there are ``partials``."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    at = tl.load(step + row)
    start = row * elements
    _, squares = draw(
        prev_sample,
        start,
        sample,
        start,
        model_output,
        uncond_output,
        guidance_scale,
        start,
        table,
        at,
        tl.load(seed + row),
        program,
        elements,
        padded,
        height,
        width,
        full,
    )
    if partials is None:
        sigma = tl.load(table + at * 3 + 2)
        squares = total(tl.reshape(squares, (padded,)), padded)
        tl.store(logprob + row, gaussian_logprob(squares, sigma, divisor, constants))
    else:
        store_partials(partials, row, program, squares, padded, height, width)


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
    """``x_{t-1}`` and its log-probability; the arguments are those of `loopfast_kernels.denoise_step`."""
    check_index("step", step, table.shape[0])
    table = table.float()
    rows = model_output.shape[0]
    elements = model_output[0].numel()
    cut = shared_row(elements)
    factors = reduction_factors(elements, reduction)
    prev_sample = torch.empty_like(sample)
    logprob = torch.empty(rows, dtype=torch.float32, device=sample.device)
    partials = None if cut.programs == 1 else logprob.new_empty(rows, cut.columns)
    launch(
        denoise_step_kernel,
        (rows, cut.programs),
        prev_sample,
        logprob,
        partials,
        model_output,
        sample,
        table,
        step,
        seed,
        uncond_output,
        guidance_scale,
        *factors,
        elements,
        padded=cut.padded,
        height=cut.height,
        width=cut.width,
        full=elements == cut.padded,
        num_warps=cut.num_warps,
        maxnreg=cut.registers,
    )
    if partials is not None:
        score(logprob, partials, table, step, *factors)
    return prev_sample, logprob


@triton.jit
def denoise_step_in_place_kernel(
    trajectory,
    model_input,
    partials,
    position,
    model_output,
    table,
    step,
    seed,
    uncond_output,
    guidance_scale,
    rows,
    elements,
    copies: tl.constexpr,
    padded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    full: tl.constexpr,
):
    """Sample a tile of a row of the trajectory store, and leave the step in ``position``."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    at = tl.load(step)
    prev, squares = draw(
        trajectory,
        ((at + 1) * rows + row) * elements,
        trajectory,
        (at * rows + row) * elements,
        model_output,
        uncond_output,
        guidance_scale,
        row * elements,
        table,
        at,
        tl.load(seed + row),
        program,
        elements,
        padded,
        height,
        width,
        full,
    )
    offsets = tile_offsets(program, padded, height, width)
    for copy in tl.static_range(copies):
        store_latents(model_input, (copy * rows + row) * elements, offsets, elements, prev, full)
    store_partials(partials, row, program, squares, padded, height, width)
    if (row == 0) & (program == 0):
        tl.store(position, at)


@triton.jit
def advance_kernel(logprob, step, position, partials, table, divisor, constants, rows, columns: tl.constexpr):
    """Score a row into its place in ``[T, N]`` and move the counter on.

    The counter is only written here, from the copy in ``position``: nobody reads what another program changes.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(position)
    squares = total(tl.load(partials + row * columns + tl.arange(0, columns)), columns)
    sigma = tl.load(table + at * 3 + 2)
    tl.store(logprob + at * rows + row, gaussian_logprob(squares, sigma, divisor, constants))
    if row == 0:
        tl.store(step, at + 1)


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
    """The in-place form; the arguments are those of `loopfast_kernels.denoise_step_`."""
    check_index("step", step, table.shape[0])
    table = table.float()
    rows = model_output.shape[0]
    elements = model_output[0].numel()
    cut = shared_row(elements)
    partials = torch.empty(rows, cut.columns, dtype=torch.float32, device=step.device)
    position = torch.empty_like(step)
    launch(
        denoise_step_in_place_kernel,
        (rows, cut.programs),
        trajectory,
        model_input,
        partials,
        position,
        model_output,
        table,
        step,
        seed,
        uncond_output,
        guidance_scale,
        rows,
        elements,
        copies=model_input.shape[0] // rows,
        padded=cut.padded,
        height=cut.height,
        width=cut.width,
        full=elements == cut.padded,
        num_warps=cut.num_warps,
    )
    partials = shorten(partials)
    columns = partials.shape[1]
    launch(
        advance_kernel,
        (rows,),
        logprob,
        step,
        position,
        partials,
        table,
        *reduction_factors(elements, reduction),
        rows,
        columns=columns,
        num_warps=whole_row(columns).num_warps,
    )
