"""Shuffles the (trajectory, step) pairs of an iteration, and splits them into updates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loopfast.seeds import generator
from loopfast.training.run import Run
from loopfast.training.state import Rollout, TrainState

Pairs = tuple[Tensor, Tensor]
"""``(rows [M], steps [M])``, int64 on the CPU: the trajectory and the transition of each pair."""


def update_pairs(run: Run, state: TrainState, rollout: Rollout) -> list[Pairs]:
    """Returns the pairs of each remaining update of an iteration. They belong to kept prompts only."""
    config = run.config
    _, trained = run.steps.for_iteration(config.run.seed, state.iteration)
    kept_rows = rollout.kept.repeat_interleave(rollout.rewards.shape[1]).nonzero()[:, 0]
    parts = [
        (kept_rows[rows], steps)
        for epoch in range(config.train.inner_epochs)
        for rows, steps in shuffled_pairs(
            len(kept_rows),
            trained,
            config.train.updates_per_iteration,
            config.run.seed,
            state.iteration,
            epoch,
            run.trained_per_trajectory,
        )
    ]
    return parts[len(state.updates) :]


def shuffled_pairs(
    count: int,
    steps: tuple[int, ...],
    updates: int,
    seed: int,
    iteration: int,
    epoch: int,
    per_trajectory: int | None = None,
) -> Iterator[Pairs]:
    """Shuffles the (row, step) pairs of one pass over an iteration, and splits them into updates.

    The loss is a mean over pairs. If ``per_trajectory`` is below the number of steps, that many steps of each
    trajectory are drawn without replacement, all with the same probability. The expectation of their mean is then the
    mean over all pairs, and the same holds for its gradient. Every pass draws again, so that all steps are used.

    Args:
        count: N, the number of trajectories.
        steps: the transitions that are trained on.
        updates: the number of updates. Their numbers of pairs differ by one at most.
        seed, iteration, epoch: determine the draw and the order.
        per_trajectory: the number of steps to draw from each trajectory. None takes all.

    Yields:
        ``(rows [M], steps [M])`` int64 on the CPU, once per update.
    """
    transitions = torch.tensor(steps, dtype=torch.int64)
    if per_trajectory is not None and per_trajectory < len(steps):
        keys = torch.rand(count, len(steps), generator=generator(seed, "steps", iteration, epoch))
        chosen = transitions[keys.argsort(1)[:, :per_trajectory]].T.flatten()
    else:
        chosen = transitions.repeat_interleave(count)
    order = torch.randperm(len(chosen), generator=generator(seed, "pairs", iteration, epoch))
    for part in order.tensor_split(updates):
        yield part % count, chosen[part]
