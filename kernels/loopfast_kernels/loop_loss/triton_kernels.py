"""The clipped surrogate, its KL penalty and their gradient on a GPU.

A row that one program can keep in registers is read once: scored, and its gradient written from the residuals at
hand. A larger one takes three launches: tiles leave partial sums, one program for each row finishes them, tiles
write the gradients.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..leave_one_out.triton_kernels import load_group, stretch
from ..transition_logprob.triton_kernels import (
    gaussian_logprob,
    load_coefficients,
    load_output,
    reduction_factors,
    standardized,
    store_partials,
)
from ..triton_common import (
    LARGEST_ON_CHIP,
    blocks,
    launch,
    load_latents,
    pad,
    shared_row,
    shorten,
    store_latents,
    tile_offsets,
    total,
    whole_row,
)
from ..validation import check_index
from .reference import LOG_RATIO_LIMIT, LossAndGradient, has_scaled_rows

_LOG_RATIO_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


@triton.jit
def load_residual(
    model_output,
    sample,
    prev_sample,
    uncond_output,
    guidance_scale,
    reference_output,
    table,
    at,
    row,
    program,
    elements,
    padded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    full: tl.constexpr,
):
    """A tile's standardized residual, and its shift from the reference model in units of sigma.

    Without a reference the shift is the residual, and stands for nothing.
    """
    a, b, _, inverse, slope = load_coefficients(table, at)
    start = row * elements
    offsets = tile_offsets(program, padded, height, width)
    output = load_output(model_output, uncond_output, guidance_scale, start, offsets, elements, full)
    x = load_latents(sample, start, offsets, elements, full)
    prev = load_latents(prev_sample, start, offsets, elements, full)
    residual = standardized(prev, x, output, a, b, inverse)
    shift = residual
    if reference_output is not None:
        shift = slope * (output - load_latents(reference_output, start, offsets, elements, full))
    return residual, shift


@triton.jit
def store_gradients(
    grad_output,
    grad_uncond,
    by_output,
    uncond_output,
    guidance_scale,
    uncond_scale,
    row,
    program,
    elements,
    padded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    full: tl.constexpr,
):
    """Write a tile of the gradients that are wanted, from the one by the guided output."""
    start = row * elements
    offsets = tile_offsets(program, padded, height, width)
    if grad_output is not None:
        if uncond_output is None:
            store_latents(grad_output, start, offsets, elements, by_output, full)
        else:
            store_latents(grad_output, start, offsets, elements, by_output * guidance_scale, full)
    if grad_uncond is not None:
        store_latents(grad_uncond, start, offsets, elements, by_output * uncond_scale, full)


@triton.jit
def power_of_two(magnitude):
    """The largest power of two not above a number, from 2^-126 to 2^126, and its inverse.

    1 for 0 and for what is not finite. Of a float32 it is the exponent's bits.
    """
    exponent = (magnitude.to(tl.int32, bitcast=True) >> 23) - 127
    proper = (magnitude > 0.0) & (exponent < 128)
    exponent = tl.where(proper, tl.minimum(tl.maximum(exponent, -126), 126), 0)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return scale, ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def settle_row(
    objective,
    logprob,
    ratio,
    advantage,
    clipped,
    kl,
    grad_scale,
    table,
    step,
    old_logprob,
    rewards,
    trajectory,
    advantage_scale,
    samples,
    stretched,
    advantage_limit,
    low,
    high,
    kl_weight,
    divisor,
    constants,
    share,
    row,
    squares,
    shifts,
    group_block: tl.constexpr,
    limited_advantage: tl.constexpr,
    limited_ratio: tl.constexpr,
    with_reference: tl.constexpr,
):
    """Everything about a row that follows from its sums; stores what the op returns by row.

    Args:
        squares: sum of the squared residuals.
        shifts: sum of the squared shifts.

    Returns:
        The gradient's factors of residual and shift, divided by the row's scale.
    """
    _, _, sigma, _, slope = load_coefficients(table, tl.load(step + row))
    score = gaussian_logprob(squares, sigma, divisor, constants)
    if rewards is None:
        gain = tl.load(advantage + row)
    else:
        place = tl.load(trajectory + row)
        first, mean = load_group(rewards, place // samples, samples, group_block)
        gain = (tl.load(rewards + place) - first - mean) * stretched * tl.load(advantage_scale)
        if limited_advantage:
            gain = tl.where(gain > advantage_limit, advantage_limit, gain)
            gain = tl.where(gain < -advantage_limit, -advantage_limit, gain)
        tl.store(advantage + row, gain)

    # Comparisons rather than minimum and maximum: what is not a number stays that.
    log_ratio = score - tl.load(old_logprob + row)
    flat = tl.abs(log_ratio) > _LOG_RATIO_LIMIT
    held = tl.where(log_ratio > _LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT, log_ratio)
    held = tl.where(held < -_LOG_RATIO_LIMIT, -_LOG_RATIO_LIMIT, held)
    r = tl.exp(held)
    surrogate = -gain * r
    value = surrogate
    if limited_ratio:
        limited = -gain * tl.where(r > high, high, tl.where(r < low, low, r))
        flat = flat | (limited > surrogate)
        value = tl.where(limited > surrogate, limited, surrogate)
    tl.store(logprob + row, score)
    tl.store(ratio + row, r)
    tl.store(clipped + row, flat)

    # d surrogate / d logprob is the surrogate itself, -A r, and d logprob / dm = (b / sigma) residual.
    by_residual = tl.where(flat, 0.0, surrogate) * share * slope
    by_shift = 0.0
    magnitude = tl.abs(by_residual)
    if with_reference:
        divergence = 0.5 * tl.div_rn(shifts, divisor)
        value += kl_weight * divergence
        tl.store(kl + row, divergence)
        by_shift = kl_weight * share * slope
        magnitude += tl.abs(by_shift) * tl.sqrt_rn(tl.div_rn(shifts, divisor * constants))
    else:
        tl.store(kl + row, 0.0)
    tl.store(objective + row, value)
    if grad_scale is not None:
        scale, inverse = power_of_two(magnitude)
        tl.store(grad_scale + row, scale)
        by_residual *= inverse
        by_shift *= inverse
    return by_residual, by_shift


@triton.jit
def loss_kernel(
    grad_output,
    grad_uncond,
    uncond_scale,
    model_output,
    sample,
    prev_sample,
    uncond_output,
    guidance_scale,
    reference_output,
    elements,
    objective,
    logprob,
    ratio,
    advantage,
    clipped,
    kl,
    grad_scale,
    table,
    step,
    old_logprob,
    rewards,
    trajectory,
    advantage_scale,
    samples,
    stretched,
    advantage_limit,
    low,
    high,
    kl_weight,
    divisor,
    constants,
    share,
    group_block: tl.constexpr,
    limited_advantage: tl.constexpr,
    limited_ratio: tl.constexpr,
    padded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    full: tl.constexpr,
):
    """A whole row: its sums, what follows from them and the gradients, from one read of the inputs."""
    row = tl.program_id(0).to(tl.int64)
    residual, shift = load_residual(
        model_output,
        sample,
        prev_sample,
        uncond_output,
        guidance_scale,
        reference_output,
        table,
        tl.load(step + row),
        row,
        0,
        elements,
        padded,
        height,
        width,
        full,
    )
    with_reference: tl.constexpr = reference_output is not None
    squares = total(tl.reshape(residual * residual, (padded,)), padded)
    shifts = squares
    if with_reference:
        shifts = total(tl.reshape(shift * shift, (padded,)), padded)
    by_residual, by_shift = settle_row(
        objective,
        logprob,
        ratio,
        advantage,
        clipped,
        kl,
        grad_scale,
        table,
        step,
        old_logprob,
        rewards,
        trajectory,
        advantage_scale,
        samples,
        stretched,
        advantage_limit,
        low,
        high,
        kl_weight,
        divisor,
        constants,
        share,
        row,
        squares,
        shifts,
        group_block,
        limited_advantage,
        limited_ratio,
        with_reference,
    )
    by_output = by_residual * residual
    if with_reference:
        by_output += by_shift * shift
    store_gradients(
        grad_output,
        grad_uncond,
        by_output,
        uncond_output,
        guidance_scale,
        uncond_scale,
        row,
        0,
        elements,
        padded,
        height,
        width,
        full,
    )


@triton.jit
def loss_partials_kernel(
    partials,
    shift_partials,
    table,
    step,
    model_output,
    sample,
    prev_sample,
    uncond_output,
    guidance_scale,
    reference_output,
    elements,
    padded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    full: tl.constexpr,
):
    """Split path, first launch: the sums of a tile, one for each column."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    residual, shift = load_residual(
        model_output,
        sample,
        prev_sample,
        uncond_output,
        guidance_scale,
        reference_output,
        table,
        tl.load(step + row),
        row,
        program,
        elements,
        padded,
        height,
        width,
        full,
    )
    store_partials(partials, row, program, residual * residual, padded, height, width)
    if shift_partials is not None:
        store_partials(shift_partials, row, program, shift * shift, padded, height, width)


@triton.jit
def settle_kernel(
    factors,
    partials,
    shift_partials,
    objective,
    logprob,
    ratio,
    advantage,
    clipped,
    kl,
    grad_scale,
    table,
    step,
    old_logprob,
    rewards,
    trajectory,
    advantage_scale,
    samples,
    stretched,
    advantage_limit,
    low,
    high,
    kl_weight,
    divisor,
    constants,
    share,
    group_block: tl.constexpr,
    limited_advantage: tl.constexpr,
    limited_ratio: tl.constexpr,
    columns: tl.constexpr,
):
    """Split path, second launch: a row from its partial sums; leaves the gradient's factors ``[N, 2]``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, columns)
    squares = total(tl.load(partials + row * columns + column), columns)
    shifts = squares
    with_reference: tl.constexpr = shift_partials is not None
    if with_reference:
        shifts = total(tl.load(shift_partials + row * columns + column), columns)
    by_residual, by_shift = settle_row(
        objective,
        logprob,
        ratio,
        advantage,
        clipped,
        kl,
        grad_scale,
        table,
        step,
        old_logprob,
        rewards,
        trajectory,
        advantage_scale,
        samples,
        stretched,
        advantage_limit,
        low,
        high,
        kl_weight,
        divisor,
        constants,
        share,
        row,
        squares,
        shifts,
        group_block,
        limited_advantage,
        limited_ratio,
        with_reference,
    )
    tl.store(factors + row * 2, by_residual)
    tl.store(factors + row * 2 + 1, by_shift)


@triton.jit
def loss_gradients_kernel(
    grad_output,
    grad_uncond,
    factors,
    table,
    step,
    uncond_scale,
    model_output,
    sample,
    prev_sample,
    uncond_output,
    guidance_scale,
    reference_output,
    elements,
    block: tl.constexpr,
    full: tl.constexpr,
):
    """Split path, third launch: the gradients of a block.

    Rows in reverse: what the first launch read last is still in the cache.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    program = tl.program_id(1)
    residual, shift = load_residual(
        model_output,
        sample,
        prev_sample,
        uncond_output,
        guidance_scale,
        reference_output,
        table,
        tl.load(step + row),
        row,
        program,
        elements,
        block,
        1,
        block,
        full,
    )
    by_output = tl.load(factors + row * 2) * residual
    if reference_output is not None:
        by_output += tl.load(factors + row * 2 + 1) * shift
    store_gradients(
        grad_output,
        grad_uncond,
        by_output,
        uncond_output,
        guidance_scale,
        uncond_scale,
        row,
        program,
        elements,
        block,
        1,
        block,
        full,
    )


@triton.jit
def mean_kernel(loss, objective, count, rows, block: tl.constexpr):
    """The mean over rows, in the order of `fold`."""
    index = tl.arange(0, block)
    values = tl.load(objective + index, mask=index < rows, other=0.0)
    tl.store(loss, tl.div_rn(total(values, block), count))


def _partial_sums(shape: tuple[int, int, int], gradient: Tensor | None, like: Tensor) -> Tensor:
    """Memory for partial sums: where the gradient will be written once they have been used."""
    if gradient is None:
        return like.new_empty(shape)
    return gradient.flatten().view(torch.uint8)[: math.prod(shape) * 4].view(torch.float32).view(shape)


def _mean(objective: Tensor) -> Tensor:
    loss = objective.new_empty(())
    count = float(objective.shape[0])
    if count > LARGEST_ON_CHIP:
        padding = triton.next_power_of_2(objective.shape[0]) - objective.shape[0]
        objective = shorten(torch.nn.functional.pad(objective, (0, padding))[None])[0]
    rows = objective.shape[0]
    block = pad(rows)
    launch(mean_kernel, (1,), loss, objective, count, rows, block=block, num_warps=whole_row(rows).num_warps)
    return loss


def _loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    group: tuple[Tensor, Tensor, Tensor, int, float, float] | tuple[None, None, None, int, float, float],
    limited_advantage: bool,
    clip_range: float | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reference_output: Tensor | None,
    kl_weight: float,
    reduction: str,
    with_grad: bool,
    with_uncond_grad: bool,
) -> LossAndGradient:
    check_index("step", step, table.shape[0])
    rows = model_output.shape[0]
    elements = model_output[0].numel()
    padded = pad(elements)
    table = table.float()
    divisor, constants = reduction_factors(elements, reduction)

    def by_row(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=model_output.device)

    grad_output = torch.empty_like(model_output) if with_grad else None
    grad_uncond = torch.empty_like(uncond_output) if with_uncond_grad and uncond_output is not None else None
    any_grad = grad_output is not None or grad_uncond is not None
    grad_scale = by_row() if any_grad and has_scaled_rows(model_output, uncond_output) else None
    objective, logprob, ratio, clipped, kl = by_row(), by_row(), by_row(), by_row(torch.bool), by_row()
    row_arguments = (
        *(objective, logprob, ratio, advantage, clipped, kl, grad_scale),
        *(table, step, old_logprob.float(), *group),
        *(1.0 - (clip_range or 0.0), 1.0 + (clip_range or 0.0), kl_weight),
        *(divisor, constants, 1.0 / (rows * divisor)),
    )
    row_options = {
        "group_block": triton.next_power_of_2(max(group[3], 1)),
        "limited_advantage": limited_advantage,
        "limited_ratio": clip_range is not None,
    }
    latents = (model_output, sample, prev_sample, uncond_output, guidance_scale, reference_output, elements)
    uncond_scale = 1.0 - guidance_scale
    if padded <= LARGEST_ON_CHIP:
        cut = whole_row(elements)
        launch(
            loss_kernel,
            (rows,),
            grad_output,
            grad_uncond,
            uncond_scale,
            *latents,
            *row_arguments,
            **row_options,
            padded=padded,
            height=cut.height,
            width=cut.width,
            full=elements == padded,
            num_warps=cut.num_warps,
            maxnreg=cut.registers,
        )
    else:
        cut = shared_row(elements)
        partials = _partial_sums(
            (2 if reference_output is not None else 1, rows, cut.columns),
            next((grad for grad in (grad_output, grad_uncond) if grad is not None), None),
            objective,
        )
        launch(
            loss_partials_kernel,
            (rows, cut.programs),
            partials[0],
            partials[1] if reference_output is not None else None,
            table,
            step,
            *latents,
            padded=padded,
            height=cut.height,
            width=cut.width,
            full=elements == padded,
            num_warps=cut.num_warps,
        )
        squares = shorten(partials[0])
        shifts = shorten(partials[1]) if reference_output is not None else None
        columns = squares.shape[1]
        factors = objective.new_empty(rows, 2)
        launch(
            settle_kernel,
            (rows,),
            factors,
            squares,
            shifts,
            *row_arguments,
            **row_options,
            columns=columns,
            num_warps=whole_row(columns).num_warps,
        )
        if any_grad:
            block, count, num_warps = blocks(elements)
            launch(
                loss_gradients_kernel,
                (rows, count),
                grad_output,
                grad_uncond,
                factors,
                table,
                step,
                uncond_scale,
                *latents,
                block=block,
                full=elements % block == 0,
                num_warps=num_warps,
            )
    loss = _mean(objective)
    return LossAndGradient(
        loss,
        logprob,
        ratio,
        advantage,
        clipped,
        kl,
        model_output.new_empty(0) if grad_output is None else grad_output,
        (model_output if uncond_output is None else uncond_output).new_empty(0)
        if grad_uncond is None
        else grad_uncond,
        logprob.new_empty(0) if grad_scale is None else grad_scale,
    )


def clipped_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    clip_range: float | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reference_output: Tensor | None,
    kl_weight: float,
    reduction: str,
    with_grad: bool,
    with_uncond_grad: bool,
) -> LossAndGradient:
    """The loss for given advantages ``[N]``; the arguments are those of `loopfast_kernels.clipped_loss`."""
    return _loss(
        model_output,
        sample,
        prev_sample,
        table,
        step,
        old_logprob,
        advantage.float(),
        (None, None, None, 0, 0.0, 0.0),
        False,
        clip_range,
        uncond_output,
        guidance_scale,
        reference_output,
        kl_weight,
        reduction,
        with_grad,
        with_uncond_grad,
    )


def loop_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    rewards: Tensor,
    trajectory: Tensor,
    advantage_scale: Tensor,
    advantage_clip: float | None,
    clip_range: float | None,
    uncond_output: Tensor | None,
    guidance_scale: float,
    reference_output: Tensor | None,
    kl_weight: float,
    reduction: str,
    with_grad: bool,
    with_uncond_grad: bool,
) -> LossAndGradient:
    """The loss for given rewards ``[G, K]``; the arguments are those of `loopfast_kernels.loop_loss`."""
    check_index("trajectory", trajectory, rewards.numel())
    samples = rewards.shape[1]
    return _loss(
        model_output,
        sample,
        prev_sample,
        table,
        step,
        old_logprob,
        torch.empty(trajectory.shape, dtype=torch.float32, device=trajectory.device),
        (
            *(rewards.float(), trajectory, advantage_scale.float()),
            *(samples, stretch(samples), advantage_clip or 0.0),
        ),
        advantage_clip is not None,
        clip_range,
        uncond_output,
        guidance_scale,
        reference_output,
        kl_weight,
        reduction,
        with_grad,
        with_uncond_grad,
    )


@triton.jit
def scale_gradients_kernel(
    grad_output, grad_uncond, grad_scale, grad_loss, elements, block: tl.constexpr, full: tl.constexpr
):
    """Scale a block of a row; nothing where the factor is 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(grad_loss)
    if grad_scale is not None:
        factor *= tl.load(grad_scale + row)
    if factor != 1.0:
        start = row * elements
        offsets = tile_offsets(tl.program_id(1), block, 1, block)
        if grad_output is not None:
            values = load_latents(grad_output, start, offsets, elements, full) * factor
            store_latents(grad_output, start, offsets, elements, values, full)
        if grad_uncond is not None:
            values = load_latents(grad_uncond, start, offsets, elements, full) * factor
            store_latents(grad_uncond, start, offsets, elements, values, full)


def scale_gradients_(grad_output: Tensor, grad_uncond: Tensor, grad_scale: Tensor, grad_loss: Tensor) -> None:
    """The backward pass: multiply the gradients in place by the loss's gradient ``[]`` and the rows' scales."""
    wanted = [grad for grad in (grad_output, grad_uncond) if grad.numel()]
    if not wanted:
        return
    rows, elements = wanted[0].shape[0], wanted[0][0].numel()
    block, count, num_warps = blocks(elements)
    launch(
        scale_gradients_kernel,
        (rows, count),
        *(grad if grad.numel() else None for grad in (grad_output, grad_uncond, grad_scale)),
        grad_loss,
        elements,
        block=block,
        full=elements % block == 0,
        num_warps=num_warps,
    )
