"""Evaluates the policy of a run, and records the metrics."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from loopfast.evaluation import Evaluation, evaluate
from loopfast.system.files import writing
from loopfast.training.run import Run
from loopfast.training.state import TrainState


def evaluated(run: Run, state: TrainState, metrics: dict[str, Any]) -> Evaluation:
    """Evaluates the policy on fixed prompts and noise, and adds the results to the iteration's metrics."""
    began = time.perf_counter()
    with run.phase("evaluation"):
        result = run.microbatches.with_oom_fallback("rollout", partial(evaluate_policy, run, state))
    metrics |= result.metrics(dropped=run.drops_bad_rewards)
    metrics["seconds_eval"] = time.perf_counter() - began
    return result


def evaluate_policy(run: Run, state: TrainState, rows: int) -> Evaluation:
    """Evaluates the policy with the whole schedule, independent of the rollout's performance options."""
    sampler = run.resize(rows)
    # With sharded weights, an exact rollout copy computes the same bits faster.
    if not (run.engine.sharded and sampler.rollout_copy is not None and sampler.rollout_copy.exact):
        sampler = replace(sampler, rollout_copy=None)
    run.scoring.iteration = state.number
    with run.scoring.errors_on_all_ranks(), run.engine.ema_weights():
        result = evaluate(
            sampler,
            run.evaluation_prompts,
            run.scoring.score,
            run.config.evaluation,
            between=run.check_stop,
            world=run.world,
        )
    run.scoring.report_dropped(result.dropped, len(result.items))
    return result


def record(run: Run, state: TrainState, result: Evaluation | None, metrics: dict[str, Any]) -> None:
    """Writes an iteration's metrics, and its evaluation if there is one. Only rank 0 calls it."""
    assert run.tracker is not None
    if result is not None:
        with writing(run.folder.path):
            grid = result.save(run.folder.path, state.iteration, state.images)
        if grid is not None:
            run.tracker.image("samples", state.iteration, grid)
            run.display.image(grid)
    run.tracker.record(metrics)
