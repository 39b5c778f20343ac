"""An iteration's metrics, by the names of `loopfast.run.tracking.METRICS`."""

from __future__ import annotations

import statistics
from typing import Any

from loopfast.config import Config
from loopfast.rewards import Scores
from loopfast.training.state import Rollout, TrainState


def rollout_metrics(config: Config, scores: Scores, rollout: Rollout) -> dict[str, float]:
    """What was sampled, of the prompts that are trained on.

    Args:
        config: the run.
        scores: of all processes' images.
        rollout: what is trained on.
    """
    kept, shape = rollout.kept, rollout.rewards.shape
    total = scores.total.view(shape)[kept]
    metrics = {
        "reward_mean": total.mean().item(),
        "reward_std": total.std(correction=0).item(),
        "group_spread": total.std(1, correction=0).mean().item(),
        **{f"reward_{name}": part.view(shape)[kept].mean().item() for name, part in scores.parts.items()},
    }
    if config.rollout.on_bad_reward == "drop_group":
        metrics["dropped_groups"] = int((~kept).sum())
    return metrics


def iteration_metrics(config: Config, state: TrainState) -> dict[str, Any]:
    """The metrics of an iteration whose updates are done: those of the sampling, and the means over its updates."""
    updates, metrics = state.updates, state.metrics
    means = {name: statistics.fmean(update[name] for update in updates) for name in updates[0]}
    if config.algorithm.kl_weight == 0:
        del means["kl_reference"]
    # a checkpoint of an earlier version may lack it
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
