"""Checks every iteration: the ratio before its first update is 1, and its losses are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loopfast.errors import LoopfastError, NonFiniteError
from loopfast.training.batch import Batch
from loopfast.training.rounding import rounding_bound
from loopfast.training.run import Run
from loopfast.training.state import TrainState
from loopfast.training.update import UpdateStatistics

# If a configuration key makes model calls differ between rollout and update, the ratio before the first update may be
# this far from 1. If the calls are the same, it is exactly 1 as long as libraries round equal calls alike.
ON_POLICY_TOLERANCE = 1e-3


def check_ratio(run: Run, state: TrainState, done: UpdateStatistics) -> None:
    """Checks that the policy before an iteration's first update is the policy that sampled.

    Raises:
        LoopfastError: the ratio differs from 1, and ``train.on_policy_check`` is ``error``.
    """
    check, deviation = run.config.train.on_policy_check, done.ratio_max_deviation
    if state.updates or check == "off" or deviation == 0:
        return
    cause = _cause(run)
    if cause is not None and deviation <= ON_POLICY_TOLERANCE:
        return
    rounding = cause is None and math.log1p(deviation) <= _rounding(run, state)
    if rounding and state.warned_of_rounding:
        return
    sizes = f"rollout.microbatch and train.microbatch are both {run.microbatches.train}"
    if rounding:
        why = f"equal calls are rounded differently here ({sizes}). The run goes on. {_remedy(run)}"
    elif cause is None:
        why = (
            f"rollout and replay disagree, by more than rounding explains, though {sizes}: something in the model "
            "draws random numbers, such as dropout, or differs between calls with and without gradients"
        )
    else:
        why = f"rollout and replay disagree. {cause}"
    message = (
        f"iteration {state.iteration + 1}: before the first update the ratio differs from 1 by up to "
        f"{deviation:.2g}, and for {done.ratio_outside_clip:.1%} of the pairs by more than the clip range; {why}"
    )
    if check == "error" and not rounding:
        error = LoopfastError(message)
        error.on_all_ranks = True
        raise error
    state.warned_of_rounding |= rounding
    run.display.warning(message)


def _rounding(run: Run, state: TrainState) -> float:
    """Returns how far rounding alone can move the logarithm of this iteration's ratios from 0."""
    config, policy = run.config, run.sampler.policy
    schedule, steps = run.steps.for_iteration(config.run.seed, state.iteration)
    return rounding_bound(
        schedule,
        steps,
        dtype=policy.dtype,
        shape=policy.latent_shape,
        guidance_scale=config.rollout.guidance_scale,
        mean=config.algorithm.logprob == "mean",
    )


def _cause(run: Run) -> str | None:
    """Names the configuration key that makes model calls differ between rollout and update. None if there is none."""
    config, sizes, rollout_copy = run.config, run.microbatches, run.sampler.rollout_copy
    if config.rollout.merge_lora:
        return "rollout.merge_lora=true rounds otherwise than the adapter that is trained"
    if rollout_copy is not None and not rollout_copy.exact:
        key = "dtype" if config.rollout.dtype not in (None, config.model.dtype) else "device"
        given, trained = getattr(config.rollout, key), getattr(config.model, key)
        return f"rollout.{key} ({given}) is not model.{key} ({trained})"
    if sizes.rollout == sizes.train:
        return None
    sizes_given = f"rollout.microbatch ({sizes.rollout}) and train.microbatch ({sizes.train})"
    return f"Give {sizes_given} the same value"


def _remedy(run: Run) -> str:
    """Returns advice that makes the rounding of equal calls differ less."""
    metric = "ratio_max_deviation in metrics.jsonl says by how much in each iteration"
    if run.sampler.policy.device.type == "cuda":
        return f"{metric}; model.attention: flash may make it 0"
    if run.sampler.policy.dtype != torch.float32:
        return f"{metric}; model.dtype: float32 makes it smaller"
    return f"{metric}; it matters only where it comes near the clip range"


@contextmanager
def explained(run: Run, state: TrainState, batch: Batch) -> Iterator[None]:
    """Context of an update that adds prompts and images to an error about a loss that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        assert state.rollout is not None
        trajectories = state.rollout.trajectories
        rows = error.rows[: run.sampler.microbatch]
        final = run.world.gather(trajectories.final, trajectories.rows, trajectories.count)[list(rows)]
        images = run.sampler.decode(final.to(run.sampler.policy.device))
        texts = [batch.prompts[int(batch.prompt_index[row])].text for row in rows]
        run.scoring.iteration = state.number
        kept = run.world.on_main(lambda: run.scoring.save_images(list(images), texts))
        raised = NonFiniteError(f"iteration {state.number}: {error}; {kept}", error.rows)
        raised.on_all_ranks = True
        raise raised from error


def warn_of_overflows(run: Run, state: TrainState, done: UpdateStatistics) -> None:
    """Warns once that updates are repeated, which takes time. Metrics count the repetitions."""
    if not done.overflows or state.warned_of_overflow:
        return
    state.warned_of_overflow = True
    run.display.warning(
        f"iteration {state.number}: the gradient overflowed float16, so that an update was repeated "
        f"{done.overflows} time(s), each with half of the loss scale. overflows in metrics.jsonl says how often in "
        "each iteration"
    )
