"""One policy update: replays (row, step) pairs of stored trajectories through the policy and steps the optimizer.

A pair whose ratio is outside the clip range on the side that its advantage pushes to, or whose advantage is 0, has a
loss without a gradient. `screen` finds these with forward calls alone, and `update` then replays only the others. With
a forward call as the unit of cost and a backward pass twice as dear, a pair costs ``1 + 3 (1 - c)`` instead of 3,
``c`` being the share without a gradient: less where c > 1/3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from loopfast.engines import Engine
from loopfast.errors import NonFiniteError
from loopfast.profiling import phase, range_
from loopfast.training.replay import Gradient, Losses, Replay


@dataclass(frozen=True)
class UpdateStatistics:
    """Means over an update's pairs, except ``ratio_max_deviation`` (a maximum) and what the engine adds.

    ``zero_gradient`` is the share of pairs whose loss has no gradient, ``screened_out`` the share of those that
    had no backward pass. ``overflows`` counts how often the gradient overflowed float16 before the update was made.
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
    """What a pass without gradients finds out about an update's M pairs.

    Attributes:
        statistics: of all of them.
        kept: bool ``[M]`` on the CPU, the pairs whose loss has a gradient.
    """

    statistics: UpdateStatistics
    kept: Tensor


def screen(
    replay: Replay, pairs: tuple[Tensor, Tensor], *, microbatch: int, padding: int | None = None
) -> Screening:
    """Finds the pairs that an update's gradient consists of, by forward calls without gradients.

    Not for a loss with a KL penalty, of which every pair has a gradient.

    Args:
        replay: the iteration's trajectories.
        pairs: as for `update`.
        microbatch: pairs per model call; may be larger than that of the update, as no activation is kept.
        padding: as for `update`.

    Raises:
        NonFiniteError: a loss is NaN or infinite. ``rows`` of the error holds the trajectories at fault.
        torch.OutOfMemoryError: the microbatch does not fit.
    """
    losses = replay.losses(pairs, microbatch, padding=padding)
    return Screening(_statistics(losses, replay, pairs), ~losses.zero_gradient.cpu())


def update(
    replay: Replay,
    engine: Engine,
    pairs: tuple[Tensor, Tensor],
    *,
    microbatch: int,
    padding: int | None = None,
    screening: Screening | None = None,
    before_step: Callable[[UpdateStatistics], None] = lambda statistics: None,
) -> UpdateStatistics:
    """One optimizer step on the mean loss of M pairs.

    Where the gradient overflows float16 the pairs are replayed again, with a lower loss scale, until it does not: their
    images are paid for.

    Args:
        replay: the iteration's trajectories.
        engine: owns the policy's weights.
        pairs: ``(rows [M], steps [M])``, which transitions to train on.
        microbatch: pairs per model call; it changes the result by no more than the rounding of a sum.
        padding: the last call's rows are filled up to a multiple of this; None: to the microbatch, so that every call
            is rounded alike.
        screening: of these pairs, under the present weights; those without a gradient are left out. The gradient is
            the same up to the rounding of a sum, and the statistics are the screening's.
        before_step: called with the statistics before the weights change; it may raise to keep them.

    Raises:
        NonFiniteError: a loss or the gradient is NaN or infinite; the weights are as they were. ``rows`` of the error
            holds the trajectories at fault.
        torch.OutOfMemoryError: the microbatch does not fit; weights and engine are as they were, so that the update
            can be tried again with a smaller one.
    """
    try:
        statistics = _accumulate(replay, engine, pairs, microbatch, padding, screening)
        before_step(statistics)
        learning_rate, overflows = engine.learning_rate, 0
        while (norm := _step(engine)) is None:
            overflows += 1
            _accumulate(replay, engine, pairs, microbatch, padding, screening)
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
    replay: Replay,
    engine: Engine,
    pairs: tuple[Tensor, Tensor],
    microbatch: int,
    padding: int | None,
    screening: Screening | None,
) -> UpdateStatistics:
    """Adds up the gradient of the pairs' mean loss; raises as `update` does."""
    if screening is None:
        losses = replay.losses(pairs, microbatch, Gradient(engine, len(pairs[0])), padding=padding)
        return _statistics(losses, replay, pairs)
    rows, steps = (index.cpu() for index in pairs)
    trained, count = (rows[screening.kept], steps[screening.kept]), float(len(rows))
    if not screening.kept.any():
        # the optimizer still steps, with gradients that are there and 0, for which any pair will do
        trained, count = (rows[:1], steps[:1]), math.inf
    losses = replay.losses(trained, microbatch, Gradient(engine, count), padding=padding)
    _statistics(losses, replay, trained)  # for what it raises: the screening's are of all pairs
    return replace(screening.statistics, screened_out=float((~screening.kept).double().mean()))


def _statistics(losses: Losses, replay: Replay, pairs: tuple[Tensor, Tensor]) -> UpdateStatistics:
    """Of an update's pairs.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    with range_("statistics", "replay"):
        rows, steps = (index.to(replay.trajectories.logprob.device) for index in pairs)
        ratio, logprob = losses.ratio.double(), losses.logprob.double()
        change = logprob - replay.trajectories.logprob[steps, rows].double()
        deviation = (ratio - 1).abs()
        clip_range = replay.loss.clip_range
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
