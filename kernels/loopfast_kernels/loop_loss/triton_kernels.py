"""The clipped surrogate, its KL penalty and their gradient on a GPU.

A row that one program can keep in registers is read once: the program scores it, and writes its gradient from the
residuals it still has. A larger row takes three launches: tiles leave partial sums, one program for each row finishes
them, tiles write the gradients.

Kernels take their pointers in tuples. A comment beside a pointer has its shape, where ``E`` is the number of elements
of a row; a pointer that is not given is None.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..leave_one_out.triton_kernels import leave_one_out_factor, load_group
from ..transition import Transition
from ..transition_logprob.triton_kernels import (
    Reduction,
    gaussian_logprob,
    load_coefficients,
    load_output,
    reduction_factors,
    standardized,
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
    store_partials,
    tile_offsets,
    total,
    whole_row,
)
from ..validation import check_index
from .reference import LOG_RATIO_LIMIT, LossAndGradient, Options, Rewards, has_scaled_rows

_LOG_RATIO_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


class Gradients(NamedTuple):
    """The gradients a kernel writes."""

    output: Tensor | None  # [N, E]
    uncond: Tensor | None  # [N, E]
    uncond_scale: float  # 1 - g


class Latents(NamedTuple):
    """The latents a kernel reads besides those of the transition."""

    prev_sample: Tensor  # [N, E]
    reference_output: Tensor | None  # [N, E]


class RowResults(NamedTuple):
    """The results of a row that a kernel writes; without rewards, `advantage` is read instead."""

    objective: Tensor  # float32 [N]
    logprob: Tensor  # float32 [N]
    ratio: Tensor  # float32 [N]
    advantage: Tensor  # float32 [N]
    clipped: Tensor  # bool [N]
    kl: Tensor  # float32 [N]
    grad_scale: Tensor | None  # float32 [N]


class Group(NamedTuple):
    """The rewards and the arguments that turn them into advantages."""

    rewards: Tensor  # float32 [G, K]
    trajectory: Tensor  # int64 [N]
    advantage_scale: Tensor  # float32 []
    samples: int  # K
    factor: float  # K / (K - 1)
    advantage_clip: float | None


class Weights(NamedTuple):
    """The numbers of the objective; the limits of the ratio are None where it is not clipped."""

    lowest_ratio: float | None  # 1 - eps
    highest_ratio: float | None  # 1 + eps
    kl_weight: float
    reduction: Reduction
    row_weight: float  # the derivative of the loss by a row's sum over elements: 1 / N, or 1 / (N E)


@triton.jit
def load_residual(transition, latents, row, program, elements, TILE: tl.constexpr):
    """Returns a tile's standardized residual, and its shift from the reference model in units of sigma.

    Without a reference model the second is the residual again, and is not used.
    """
    a, b, _, inverse_sigma, slope = load_coefficients(transition.table, tl.load(transition.step + row))
    start = row * elements
    offsets = tile_offsets(program, TILE)
    output = load_output(transition, start, offsets, elements, TILE)
    sample = load_latents(transition.sample, start, offsets, elements, TILE)
    prev = load_latents(latents.prev_sample, start, offsets, elements, TILE)
    residual = standardized(prev, sample, output, a, b, inverse_sigma)
    shift = residual
    if latents.reference_output is not None:
        shift = slope * (output - load_latents(latents.reference_output, start, offsets, elements, TILE))
    return residual, shift


@triton.jit
def store_gradients(
    gradients,
    by_output,  # [height, width], the gradient by the guided output
    transition,
    row,
    program,
    elements,
    TILE: tl.constexpr,
):
    """Stores a tile of each gradient that is wanted."""
    start = row * elements
    offsets = tile_offsets(program, TILE)
    if gradients.output is not None:
        grad_output = by_output
        if transition.uncond_output is not None:
            grad_output = by_output * transition.guidance_scale
        store_latents(gradients.output, start, offsets, elements, grad_output, TILE)
    if gradients.uncond is not None:
        store_latents(gradients.uncond, start, offsets, elements, by_output * gradients.uncond_scale, TILE)


@triton.jit
def power_of_two(magnitude):
    """Returns the largest power of two not above a number, from 2^-126 to 2^126, and its inverse.

    Both are 1 for 0 and for a number that is not finite. The exponent is read from the bits of the float32.
    """
    exponent = (magnitude.to(tl.int32, bitcast=True) >> 23) - 127
    proper = (magnitude > 0.0) & (exponent < 128)
    exponent = tl.where(proper, tl.minimum(tl.maximum(exponent, -126), 126), 0)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return scale, ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def clamp(value, limit):
    """Returns a value between plus and minus ``limit``; NaN stays NaN, unlike with minimum and maximum."""
    value = tl.where(value > limit, limit, value)
    return tl.where(value < -limit, -limit, value)


@triton.jit
def leave_one_out_advantage(group, row, GROUP_BLOCK: tl.constexpr):
    """Returns a row's advantage over the other samples of its group, after scale and clip."""
    at = tl.load(group.trajectory + row)
    first, mean = load_group(group.rewards, at // group.samples, group.samples, GROUP_BLOCK)
    relative = tl.load(group.rewards + at) - first - mean
    advantage = relative * group.factor * tl.load(group.advantage_scale)
    if group.advantage_clip is not None:
        advantage = clamp(advantage, group.advantage_clip)
    return advantage


@triton.jit
def finish_row(
    results,
    table,  # float32 [T, 3]
    step,  # int64 [N]
    old_logprob,  # float32 [N]
    group,
    weights,
    row,
    squares,
    shift_squares,
    GROUP_BLOCK: tl.constexpr,
):
    """Computes and stores everything about a row that follows from its sums.

    Args:
        squares: sum of the squared residuals.
        shift_squares: sum of the squared shifts, or None without a reference model.

    Returns:
        The gradient's factors of residual and shift, divided by the row's scale.
    """
    _, _, sigma, _, slope = load_coefficients(table, tl.load(step + row))
    reduction = weights.reduction
    logprob = gaussian_logprob(squares, sigma, reduction)
    if group is None:
        advantage = tl.load(results.advantage + row)
    else:
        advantage = leave_one_out_advantage(group, row, GROUP_BLOCK)
        tl.store(results.advantage + row, advantage)

    log_ratio = logprob - tl.load(old_logprob + row)
    clipped = tl.abs(log_ratio) > _LOG_RATIO_LIMIT
    ratio = tl.exp(clamp(log_ratio, _LOG_RATIO_LIMIT))
    surrogate = -advantage * ratio
    objective = surrogate
    if weights.lowest_ratio is not None:
        lowest, highest = weights.lowest_ratio, weights.highest_ratio
        clipped_ratio = tl.where(ratio > highest, highest, tl.where(ratio < lowest, lowest, ratio))
        clipped_surrogate = -advantage * clipped_ratio
        clipped = clipped | (clipped_surrogate > surrogate)
        objective = tl.where(clipped_surrogate > surrogate, clipped_surrogate, surrogate)
    tl.store(results.logprob + row, logprob)
    tl.store(results.ratio + row, ratio)
    tl.store(results.clipped + row, clipped)

    # d surrogate / d logprob is the surrogate itself, -A r, and d logprob / dm = (b / sigma) residual.
    by_residual = tl.where(clipped, 0.0, surrogate) * weights.row_weight * slope
    by_shift = 0.0
    magnitude = tl.abs(by_residual)
    if shift_squares is None:
        tl.store(results.kl + row, 0.0)
    else:
        kl = 0.5 * tl.div_rn(shift_squares, reduction.divisor)
        objective += weights.kl_weight * kl
        tl.store(results.kl + row, kl)
        by_shift = weights.kl_weight * weights.row_weight * slope
        magnitude += tl.abs(by_shift) * tl.sqrt_rn(
            tl.div_rn(shift_squares, reduction.divisor * reduction.constants)
        )
    tl.store(results.objective + row, objective)
    if results.grad_scale is not None:
        scale, inverse = power_of_two(magnitude)
        tl.store(results.grad_scale + row, scale)
        by_residual *= inverse
        by_shift *= inverse
    return by_residual, by_shift


@triton.jit
def loss_kernel(
    gradients,  # Gradients
    transition,  # Transition
    latents,  # Latents
    results,  # RowResults
    old_logprob,  # float32 [N]
    group,  # Group or None
    weights,  # Weights
    elements,
    GROUP_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Computes a whole row: its sums, its results and the gradients, from one read of the inputs."""
    row = tl.program_id(0).to(tl.int64)
    residual, shift = load_residual(transition, latents, row, 0, elements, TILE)
    squares = total(tl.reshape(residual * residual, (TILE.padded,)), TILE.padded)
    shift_squares = None
    if latents.reference_output is not None:
        shift_squares = total(tl.reshape(shift * shift, (TILE.padded,)), TILE.padded)
    by_residual, by_shift = finish_row(
        results,
        transition.table,
        transition.step,
        old_logprob,
        group,
        weights,
        row,
        squares,
        shift_squares,
        GROUP_BLOCK,
    )
    by_output = by_residual * residual
    if latents.reference_output is not None:
        by_output += by_shift * shift
    store_gradients(gradients, by_output, transition, row, 0, elements, TILE)


@triton.jit
def loss_partials_kernel(
    partials,  # float32 [N, columns]
    shift_partials,  # float32 [N, columns] or None
    transition,  # Transition
    latents,  # Latents
    elements,
    TILE: tl.constexpr,
):
    """Leaves the sums of a tile, one for each column: the first launch for larger rows."""
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    residual, shift = load_residual(transition, latents, row, program, elements, TILE)
    store_partials(partials, row, program, residual * residual, TILE)
    if shift_partials is not None:
        store_partials(shift_partials, row, program, shift * shift, TILE)


@triton.jit
def finish_kernel(
    factors,  # float32 [N, 2]
    partials,  # float32 [N, COLUMNS]
    shift_partials,  # float32 [N, COLUMNS] or None
    results,  # RowResults
    table,  # float32 [T, 3]
    step,  # int64 [N]
    old_logprob,  # float32 [N]
    group,  # Group or None
    weights,  # Weights
    GROUP_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Finishes a row from its partial sums and leaves the gradient's factors: the second launch for larger rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    squares = total(tl.load(partials + row * COLUMNS + column), COLUMNS)
    shift_squares = None
    if shift_partials is not None:
        shift_squares = total(tl.load(shift_partials + row * COLUMNS + column), COLUMNS)
    by_residual, by_shift = finish_row(
        results, table, step, old_logprob, group, weights, row, squares, shift_squares, GROUP_BLOCK
    )
    tl.store(factors + row * 2, by_residual)
    tl.store(factors + row * 2 + 1, by_shift)


@triton.jit
def loss_gradients_kernel(
    gradients,  # Gradients
    factors,  # float32 [N, 2]
    transition,  # Transition
    latents,  # Latents
    elements,
    TILE: tl.constexpr,
):
    """Writes the gradients of a block: the third launch for larger rows.

    Rows are taken in reverse: the part that the first launch read last is still in the cache.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    program = tl.program_id(1)
    residual, shift = load_residual(transition, latents, row, program, elements, TILE)
    by_output = tl.load(factors + row * 2) * residual
    if latents.reference_output is not None:
        by_output += tl.load(factors + row * 2 + 1) * shift
    store_gradients(gradients, by_output, transition, row, program, elements, TILE)


@triton.jit
def mean_kernel(
    loss,  # float32 []
    objective,  # float32 [rows]
    count,
    rows,
    BLOCK: tl.constexpr,
):
    """Writes the sum over rows, in the order of `fold`, divided by ``count``."""
    index = tl.arange(0, BLOCK)
    values = tl.load(objective + index, mask=index < rows, other=0.0)
    tl.store(loss, tl.div_rn(total(values, BLOCK), count))


def _partial_sums(shape: tuple[int, int, int], gradients: Gradients, like: Tensor) -> Tensor:
    """Returns memory for partial sums: that of a gradient, which is written once the sums have been used."""
    for gradient in (gradients.output, gradients.uncond):
        if gradient is not None:
            return (
                gradient.flatten().view(torch.uint8)[: math.prod(shape) * 4].view(torch.float32).view(shape)
            )
    return like.new_empty(shape)


def _mean(objective: Tensor) -> Tensor:
    loss = objective.new_empty(())
    count = float(objective.shape[0])
    if count > LARGEST_ON_CHIP:
        padding = triton.next_power_of_2(objective.shape[0]) - objective.shape[0]
        objective = shorten(torch.nn.functional.pad(objective, (0, padding))[None])[0]
    rows = objective.shape[0]
    num_warps = whole_row(rows).num_warps
    launch(mean_kernel, (1,), loss, objective, count, rows, BLOCK=pad(rows), num_warps=num_warps)
    return loss


def _loss(
    transition: Transition,
    prev_sample: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    group: Group | None,
    options: Options,
) -> LossAndGradient:
    check_index("step", transition.step, transition.table.shape[0])
    transition = transition._replace(table=transition.table.float())
    old_logprob = old_logprob.float()
    output, uncond = transition.model_output, transition.uncond_output
    rows, elements = output.shape[0], output[0].numel()
    reduction = reduction_factors(elements, options.reduction)
    latents = Latents(prev_sample, options.reference_output)
    gradients = Gradients(
        output=torch.empty_like(output) if options.with_grad else None,
        uncond=torch.empty_like(uncond) if options.with_uncond_grad and uncond is not None else None,
        uncond_scale=1.0 - transition.guidance_scale,
    )

    def by_row(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=output.device)

    results = RowResults(
        objective=by_row(),
        logprob=by_row(),
        ratio=by_row(),
        advantage=advantage,
        clipped=by_row(torch.bool),
        kl=by_row(),
        grad_scale=by_row() if has_scaled_rows(transition, options) else None,
    )
    clip_range = options.clip_range
    weights = Weights(
        lowest_ratio=None if clip_range is None else 1.0 - clip_range,
        highest_ratio=None if clip_range is None else 1.0 + clip_range,
        kl_weight=options.kl_weight,
        reduction=reduction,
        row_weight=1.0 / (rows * reduction.divisor),
    )
    group_block = 1 if group is None else triton.next_power_of_2(group.samples)
    if pad(elements) <= LARGEST_ON_CHIP:
        cut = whole_row(elements)
        launch(
            loss_kernel,
            (rows,),
            gradients,
            transition,
            latents,
            results,
            old_logprob,
            group,
            weights,
            elements,
            GROUP_BLOCK=group_block,
            TILE=cut.tile,
            num_warps=cut.num_warps,
            maxnreg=cut.registers,
        )
    else:
        cut = shared_row(elements)
        with_reference = latents.reference_output is not None
        sums = _partial_sums((2 if with_reference else 1, rows, cut.columns), gradients, results.objective)
        partials, shift_partials = sums[0], sums[1] if with_reference else None
        launch(
            loss_partials_kernel,
            (rows, cut.programs),
            partials,
            shift_partials,
            transition,
            latents,
            elements,
            TILE=cut.tile,
            num_warps=cut.num_warps,
        )
        partials = shorten(partials)
        columns = partials.shape[1]
        factors = results.objective.new_empty(rows, 2)
        launch(
            finish_kernel,
            (rows,),
            factors,
            partials,
            None if shift_partials is None else shorten(shift_partials),
            results,
            transition.table,
            transition.step,
            old_logprob,
            group,
            weights,
            GROUP_BLOCK=group_block,
            COLUMNS=columns,
            num_warps=whole_row(columns).num_warps,
        )
        if gradients.output is not None or gradients.uncond is not None:
            tile, programs, num_warps = blocks(elements)
            launch(
                loss_gradients_kernel,
                (rows, programs),
                gradients,
                factors,
                transition,
                latents,
                elements,
                TILE=tile,
                num_warps=num_warps,
            )
    objective, logprob, ratio, advantage, clipped, kl, grad_scale = results
    return LossAndGradient(
        loss=_mean(objective),
        logprob=logprob,
        ratio=ratio,
        advantage=advantage,
        clipped=clipped,
        kl=kl,
        grad_output=output.new_empty(0) if gradients.output is None else gradients.output,
        grad_uncond=(output if uncond is None else uncond).new_empty(0)
        if gradients.uncond is None
        else gradients.uncond,
        grad_scale=logprob.new_empty(0) if grad_scale is None else grad_scale,
    )


def clipped_loss(
    transition: Transition, prev_sample: Tensor, old_logprob: Tensor, advantage: Tensor, options: Options
) -> LossAndGradient:
    """Returns the loss for advantages ``[N]``, as `reference` does."""
    return _loss(transition, prev_sample, old_logprob, advantage.float(), None, options)


def loop_loss(
    transition: Transition, prev_sample: Tensor, old_logprob: Tensor, rewards: Rewards, options: Options
) -> LossAndGradient:
    """Returns the loss for rewards ``[G, K]``, as `reference` does."""
    values, trajectory = rewards.rewards.float(), rewards.trajectory
    check_index("trajectory", trajectory, values.numel())
    samples = values.shape[1]
    group = Group(
        rewards=values,
        trajectory=trajectory,
        advantage_scale=rewards.advantage_scale.float(),
        samples=samples,
        factor=leave_one_out_factor(samples),
        advantage_clip=rewards.advantage_clip,
    )
    advantage = torch.empty(trajectory.shape, dtype=torch.float32, device=trajectory.device)
    return _loss(transition, prev_sample, old_logprob, advantage, group, options)


@triton.jit
def scale_gradients_kernel(
    grad_output,  # [N, E] or None
    grad_uncond,  # [N, E] or None
    grad_scale,  # float32 [N] or None
    grad_loss,  # float32 []
    elements,
    TILE: tl.constexpr,
):
    """Scales a block of a row; does nothing where the factor is 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(grad_loss)
    if grad_scale is not None:
        factor *= tl.load(grad_scale + row)
    if factor != 1.0:
        start = row * elements
        offsets = tile_offsets(tl.program_id(1), TILE)
        if grad_output is not None:
            values = load_latents(grad_output, start, offsets, elements, TILE) * factor
            store_latents(grad_output, start, offsets, elements, values, TILE)
        if grad_uncond is not None:
            values = load_latents(grad_uncond, start, offsets, elements, TILE) * factor
            store_latents(grad_uncond, start, offsets, elements, values, TILE)


def scale_gradients_(grad_output: Tensor, grad_uncond: Tensor, grad_scale: Tensor, grad_loss: Tensor) -> None:
    """Scales the gradients in the backward pass, as `reference` does."""
    wanted = [grad for grad in (grad_output, grad_uncond) if grad.numel()]
    if not wanted:
        return
    rows, elements = wanted[0].shape[0], wanted[0][0].numel()
    tile, programs, num_warps = blocks(elements)
    launch(
        scale_gradients_kernel,
        (rows, programs),
        *(grad if grad.numel() else None for grad in (grad_output, grad_uncond, grad_scale)),
        grad_loss,
        elements,
        TILE=tile,
        num_warps=num_warps,
    )
