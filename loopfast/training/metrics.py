"""Computes an iteration's metrics. `loopfast.run.tracking.METRICS` describes them."""

from __future__ import annotations

import statistics
from typing import Any

from loopfast.rewards import Scores
from loopfast.training.run import Run
from loopfast.training.state import Rollout, TrainState


def rollout_metrics(scores: Scores, rollout: Rollout, *, count_dropped: bool) -> dict[str, float]:
    """Returns the metrics of a rollout, over the kept prompts.

    Args:
        scores: the scores of all ranks' images.
        rollout: the rollout.
        count_dropped: whether to report the number of dropped prompts.
    """
    kept, shape = rollout.kept, rollout.rewards.shape
    total = scores.total.view(shape)[kept]
    metrics = {
        "reward_mean": total.mean().item(),
        "reward_std": total.std(correction=0).item(),
        "group_spread": total.std(1, correction=0).mean().item(),
        **{f"reward_{name}": part.view(shape)[kept].mean().item() for name, part in scores.parts.items()},
    }
    if count_dropped:
        metrics["dropped_groups"] = int((~kept).sum())
    return metrics


def iteration_metrics(run: Run, state: TrainState) -> dict[str, Any]:
    """Returns the metrics of an iteration after its last update: the rollout's, and means over its updates."""
    config, updates, metrics = run.config, state.updates, state.metrics
    means = {name: statistics.fmean(update[name] for update in updates) for name in updates[0]}
    if config.algorithm.kl_weight == 0:
        del means["kl_reference"]
    # Updates from an earlier version's checkpoint may lack it.
    means.pop("overflows", None)
    counts = {}
    if config.model.dtype == "float16":
        counts["overflows"] = sum(update.get("overflows", 0) for update in updates)
    seconds = metrics["seconds_iteration"]
    return {
        **metrics,
        "images_per_second": config.images_per_iteration / seconds,
        "model_calls_per_second": metrics["model_calls"] / seconds,
        "outside_model_share": 1 - metrics["seconds_model"] / seconds,
        **means,
        **counts,
        "ratio_max_deviation": updates[0]["ratio_max_deviation"],
        "on_policy_outside_clip": updates[0]["ratio_outside_clip"],
        "learning_rate": updates[-1]["learning_rate"],
    }
