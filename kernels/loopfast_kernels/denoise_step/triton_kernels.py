"""One sampling step on a GPU."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox.triton_kernels import normal_noise
from ..transition import Transition
from ..transition_logprob.triton_kernels import (
    gaussian_logprob,
    load_coefficients,
    load_output,
    reduction_factors,
    score,
    standardized,
)
from ..triton_common import (
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


@triton.jit
def draw(
    prev_sample,  # [N, E]
    prev_start,
    transition,  # Transition
    sample_start,
    output_start,
    at,
    seed,
    program,
    elements,
    TILE: tl.constexpr,
):
    """Samples a tile of a row and stores it. The starts are the row's offsets in the tensors.

    Returns:
        The tile as it was rounded and the squares of its standardized residuals, both float32
        ``[height, width]``.
    """
    a, b, sigma, inverse_sigma, _ = load_coefficients(transition.table, at)
    offsets = tile_offsets(program, TILE)
    output = load_output(transition, output_start, offsets, elements, TILE)
    sample = load_latents(transition.sample, sample_start, offsets, elements, TILE)
    # A thread makes as many normals as it loads elements at once, so that they meet without an exchange.
    dtype: tl.constexpr = prev_sample.dtype.element_ty
    together: tl.constexpr = 128 // dtype.primitive_bitwidth
    rows = tl.arange(0, TILE.height) * (TILE.padded // together // TILE.height)
    columns = program * (TILE.width // together) + tl.arange(0, TILE.width // together)
    noise = normal_noise(seed, at, rows[:, None] + columns[None, :], together)
    noise = tl.reshape(noise, (TILE.height, TILE.width))
    # The log-probability is that of the sample as it is stored: rounded.
    prev = (a * sample + b * output + sigma * noise).to(dtype)
    store_latents(prev_sample, prev_start, offsets, elements, prev, TILE)
    prev = prev.to(tl.float32)
    residual = standardized(prev, sample, output, a, b, inverse_sigma)
    if not TILE.full:
        residual = tl.where(offsets < elements, residual, 0.0)
    return prev, residual * residual


@triton.jit
def denoise_step_kernel(
    prev_sample,  # [N, E]
    logprob,  # float32 [N]
    partials,  # float32 [N, columns], or None where one program takes a row
    transition,  # Transition
    seed,  # int64 [N]
    reduction,  # Reduction
    elements,
    TILE: tl.constexpr,
):
    """Samples and scores a row, or samples a tile and leaves its partial sums."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    at = tl.load(transition.step + row)
    start = row * elements
    seed = tl.load(seed + row)
    _, squares = draw(prev_sample, start, transition, start, start, at, seed, program, elements, TILE)
    if partials is None:
        sigma = tl.load(transition.table + at * 3 + 2)
        squares = total(tl.reshape(squares, (TILE.padded,)), TILE.padded)
        tl.store(logprob + row, gaussian_logprob(squares, sigma, reduction))
    else:
        store_partials(partials, row, program, squares, TILE)


def denoise_step(transition: Transition, seed: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Returns ``x_{t-1}`` and its log-probability, as `reference` does."""
    check_index("step", transition.step, transition.table.shape[0])
    transition = transition._replace(table=transition.table.float())
    prev_sample = torch.empty_like(transition.sample)
    rows, elements = prev_sample.shape[0], prev_sample[0].numel()
    cut = shared_row(elements)
    factors = reduction_factors(elements, reduction)
    logprob = torch.empty(rows, dtype=torch.float32, device=prev_sample.device)
    partials = None if cut.programs == 1 else logprob.new_empty(rows, cut.columns)
    launch(
        denoise_step_kernel,
        (rows, cut.programs),
        prev_sample,
        logprob,
        partials,
        transition,
        seed,
        factors,
        elements,
        TILE=cut.tile,
        num_warps=cut.num_warps,
        maxnreg=cut.registers,
    )
    if partials is not None:
        score(logprob, partials, transition, factors)
    return prev_sample, logprob


@triton.jit
def denoise_step_in_place_kernel(
    model_input,  # [COPIES, N, E]
    partials,  # float32 [N, columns]
    position,  # int64 [1]
    transition,  # Transition; its sample is the store [T + 1, N, E], its step is [1]
    seed,  # int64 [N]
    rows,
    elements,
    COPIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Samples a tile of a row of the trajectory store, and leaves the step in ``position``."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    at = tl.load(transition.step)
    prev, squares = draw(
        transition.sample,
        ((at + 1) * rows + row) * elements,
        transition,
        (at * rows + row) * elements,
        row * elements,
        at,
        tl.load(seed + row),
        program,
        elements,
        TILE,
    )
    offsets = tile_offsets(program, TILE)
    for copy in tl.static_range(COPIES):
        store_latents(model_input, (copy * rows + row) * elements, offsets, elements, prev, TILE)
    store_partials(partials, row, program, squares, TILE)
    if (row == 0) & (program == 0):
        tl.store(position, at)


@triton.jit
def advance_kernel(
    logprob,  # float32 [T, N]
    step,  # int64 [1]
    position,  # int64 [1]
    partials,  # float32 [N, COLUMNS]
    table,  # float32 [T, 3]
    reduction,  # Reduction
    rows,
    COLUMNS: tl.constexpr,
):
    """Scores a row into its place and advances the counter.

    The counter is written only here, from the copy in ``position``: no program reads what another one changes.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(position)
    squares = total(tl.load(partials + row * COLUMNS + tl.arange(0, COLUMNS)), COLUMNS)
    sigma = tl.load(table + at * 3 + 2)
    tl.store(logprob + at * rows + row, gaussian_logprob(squares, sigma, reduction))
    if row == 0:
        tl.store(step, at + 1)


def denoise_step_(
    transition: Transition, logprob: Tensor, model_input: Tensor, seed: Tensor, reduction: str
) -> None:
    """Takes the step in place, as `reference` does."""
    step, output = transition.step, transition.model_output
    check_index("step", step, transition.table.shape[0])
    transition = transition._replace(table=transition.table.float())
    rows, elements = output.shape[0], output[0].numel()
    cut = shared_row(elements)
    partials = torch.empty(rows, cut.columns, dtype=torch.float32, device=step.device)
    position = torch.empty_like(step)
    launch(
        denoise_step_in_place_kernel,
        (rows, cut.programs),
        model_input,
        partials,
        position,
        transition,
        seed,
        rows,
        elements,
        COPIES=model_input.shape[0] // rows,
        TILE=cut.tile,
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
        transition.table,
        reduction_factors(elements, reduction),
        rows,
        COLUMNS=columns,
        num_warps=whole_row(columns).num_warps,
    )
