"""Measures the policy of a run, and records what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loopfast.evaluation import Evaluation, evaluate
from loopfast.system.files import writing
from loopfast.training.run import Run
from loopfast.training.state import TrainState


def evaluate_policy(run: Run, state: TrainState, rows: int) -> Evaluation:
    """Measures the policy itself, by the whole schedule: what is measured depends on no lever of the rollout."""
    sampler = run.resize(rows)
    # where the weights are spread over processes, a copy that computes the same bits is the faster way to them
    if not (run.engine.sharded and sampler.replica is not None and sampler.replica.exact):
        sampler = replace(sampler, replica=None)
    run.scoring.iteration = state.number
    with run.scoring.together(), run.engine.averaged():
        result = evaluate(
            sampler,
            run.evaluation_prompts,
            run.scoring.score,
            run.config.evaluation,
            between=run.check_stop,
            group=run.group,
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
    run.tracker.record(metrics)
