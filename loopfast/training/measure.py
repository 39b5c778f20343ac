"""Measures the policy of a run, and records what was measured."""

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
    """Measures the policy on fixed prompts and noise, and adds what was measured to the iteration's metrics."""
    began = time.perf_counter()
    with run.phase("evaluation"):
        result = run.microbatches.with_oom_fallback("rollout", partial(evaluate_policy, run, state))
    metrics |= result.metrics(dropped=run.config.rollout.on_bad_reward == "drop_group")
    metrics["seconds_eval"] = time.perf_counter() - began
    return result


def evaluate_policy(run: Run, state: TrainState, rows: int) -> Evaluation:
    """Measures the policy itself, by the whole schedule: what is measured depends on no lever of the rollout."""
    sampler = run.resize(rows)
    # where the weights are spread over processes, a copy that computes the same bits is the faster way to them
    if not (run.engine.sharded and sampler.rollout_copy is not None and sampler.rollout_copy.exact):
        sampler = replace(sampler, rollout_copy=None)
    run.scoring.iteration = state.number
    with run.scoring.together(), run.engine.averaged():
        result = evaluate(
            sampler,
            run.evaluation_prompts,
            run.scoring.score,
            run.config.evaluation,
            between=run.check_stop,
            world=run.world,
        )
    run.scoring.account_for(result.dropped, len(result.items))
    return result


def record(run: Run, state: TrainState, result: Evaluation | None, metrics: dict[str, Any]) -> None:
    """Keeps an iteration's metrics, and its evaluation, if any; in the first process."""
    assert run.tracker is not None
    if result is not None:
        with writing(run.folder.path):
            grid = result.save(run.folder.path, state.iteration, state.images)
        if grid is not None:
            run.tracker.image("samples", state.iteration, grid)
            run.display.image(grid)
    run.tracker.record(metrics)
