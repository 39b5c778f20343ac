"""One policy update: the loss of (row, step) pairs of stored trajectories, its gradient, an optimizer step.

The loss of a pair has no gradient if its advantage is 0, or if its ratio is outside the clip range on the side that its
advantage pushes to. `screen` finds these pairs with forward calls alone, and `update` then trains on the others only.
Let a forward call cost 1, a backward pass 2, and c be the share of pairs without a gradient. A screened pair then costs
``1 + 3 (1 - c)`` instead of 3, which is less if c > 1/3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from loopfast.engines import Engine
from loopfast.errors import NonFiniteError
from loopfast.profiling import phase, range_
from loopfast.training.update_pass import Losses, UpdatePass


@dataclass(frozen=True)
class UpdateStatistics:
    """Means over an update's pairs, except ``ratio_max_deviation`` (a maximum) and the engine's numbers.

    ``zero_gradient`` is the share of pairs whose loss has no gradient. ``screened_out`` is the share of pairs that had
    no backward pass. ``overflows`` counts the gradients that overflowed float16 before the optimizer stepped.
    """

    loss: float
    kl: float
    kl_reference: float
    clip_fraction: float
    ratio_outside_clip: float
    ratio_max_deviation: float
    logprob_change: float
    zero_gradient: float
    screened_out: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    overflows: int = 0


@dataclass(frozen=True)
class Screening:
    """The result of a pass without gradients over an update's M pairs.

    Attributes:
        statistics: the statistics of all pairs.
        kept: bool ``[M]`` on the CPU, the pairs whose loss has a gradient.
    """

    statistics: UpdateStatistics
    kept: Tensor


def screen(
    update_pass: UpdatePass, pairs: tuple[Tensor, Tensor], *, microbatch: int, padding: int | None = None
) -> Screening:
    """Finds the pairs whose loss has a gradient, by forward calls without gradients.

    With a KL penalty every pair has a gradient, and this function cannot be used.

    Args:
        update_pass: the iteration's trajectories.
        pairs: as for `update`.
        microbatch: the number of pairs per model call. It may be larger than the update's, as no activation is kept.
        padding: as for `update`.

    Raises:
        NonFiniteError: a loss is NaN or infinite. ``rows`` of the error holds the trajectories at fault.
        torch.OutOfMemoryError: the microbatch does not fit.
    """
    losses = update_pass.losses(pairs, microbatch, padding=padding)
    return Screening(_statistics(losses, update_pass, pairs), ~losses.zero_gradient.cpu())


def update(
    update_pass: UpdatePass,
    engine: Engine,
    pairs: tuple[Tensor, Tensor],
    *,
    microbatch: int,
    padding: int | None = None,
    screening: Screening | None = None,
    before_step: Callable[[UpdateStatistics], None] = lambda statistics: None,
) -> UpdateStatistics:
    """Takes one optimizer step on the mean loss of M pairs.

    If the gradient overflows float16, the pass is repeated with a lower loss scale until it does not, as the images
    have been sampled and scored already.

    Args:
        update_pass: the iteration's trajectories.
        engine: owns the policy's weights.
        pairs: ``(rows [M], steps [M])``, the transitions to train on.
        microbatch: the number of pairs per model call. It changes the result only by the rounding of a sum.
        padding: the last call is padded to a multiple of this number of rows. None pads it to the microbatch, so that
            every call is rounded alike.
        screening: the result of `screen` for these pairs and the present weights. Pairs without a gradient are
            skipped. The gradient is the same up to the rounding of a sum, and the statistics are the screening's.
        before_step: called with the statistics before the weights change. If it raises, the weights do not change.

    Raises:
        NonFiniteError: a loss or the gradient is NaN or infinite. The weights have not changed. ``rows`` of the error
            holds the trajectories at fault.
        torch.OutOfMemoryError: the microbatch does not fit. Weights and engine have not changed, so that the update
            can be repeated with a smaller microbatch.
    """
    try:
        statistics = _accumulate(update_pass, engine, pairs, microbatch, padding, screening)
        before_step(statistics)
        learning_rate, overflows = engine.learning_rate, 0
        while (norm := _step(engine)) is None:
            overflows += 1
            _accumulate(update_pass, engine, pairs, microbatch, padding, screening)
    except NonFiniteError as error:
        engine.discard()
        raise NonFiniteError(str(error), error.rows or pairs[0].unique().tolist()) from error
    except BaseException:
        engine.discard()
        raise
    return replace(statistics, grad_norm=norm, learning_rate=learning_rate, overflows=overflows)


def _step(engine: Engine) -> float | None:
    with phase("optimizer"):
        return engine.update()


def _accumulate(
    update_pass: UpdatePass,
    engine: Engine,
    pairs: tuple[Tensor, Tensor],
    microbatch: int,
    padding: int | None,
    screening: Screening | None,
) -> UpdateStatistics:
    """Accumulates the gradient of the pairs' mean loss. Raises as `update` does."""
    if screening is None:
        losses = update_pass.losses(pairs, microbatch, engine, len(pairs[0]), padding=padding)
        return _statistics(losses, update_pass, pairs)
    rows, steps = (index.cpu() for index in pairs)
    trained, count = (rows[screening.kept], steps[screening.kept]), float(len(rows))
    if not screening.kept.any():
        # The optimizer still steps, with gradients of 0. Any pair provides them.
        trained, count = (rows[:1], steps[:1]), math.inf
    losses = update_pass.losses(trained, microbatch, engine, count, padding=padding)
    _statistics(
        losses, update_pass, trained
    )  # raises if a loss is not finite; the screening has the statistics
    return replace(screening.statistics, screened_out=float((~screening.kept).double().mean()))


def _statistics(losses: Losses, update_pass: UpdatePass, pairs: tuple[Tensor, Tensor]) -> UpdateStatistics:
    """Returns the statistics of an update's pairs.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    with range_("statistics", "replay"):
        rows, steps = (index.to(update_pass.trajectories.logprob.device) for index in pairs)
        ratio, logprob = losses.ratio.double(), losses.logprob.double()
        change = logprob - update_pass.trajectories.logprob[steps, rows].double()
        deviation = (ratio - 1).abs()
        clip_range = update_pass.loss.clip_range
        outside = 0.0 if clip_range is None else float((deviation > clip_range).double().mean())
        statistics = UpdateStatistics(
            loss=losses.loss,
            # E[r − 1 − log r], an estimate of KL(sampling policy ‖ present policy) that is never negative
            kl=float((ratio - 1 - change.clamp(-20, 20)).mean()),
            kl_reference=float(losses.kl.double().mean()),
            clip_fraction=float(losses.clipped.double().mean()),
            ratio_outside_clip=outside,
            ratio_max_deviation=float(deviation.max()),
            logprob_change=float(change.abs().mean()),
            zero_gradient=float(losses.zero_gradient.double().mean()),
        )
    if not (math.isfinite(statistics.loss) and math.isfinite(statistics.ratio_max_deviation)):
        at_fault = rows[~logprob.isfinite()].unique().tolist() or rows.unique().tolist()
        raise NonFiniteError("the loss is not finite", at_fault)
    return statistics
