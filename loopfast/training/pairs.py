"""The (trajectory, step) pairs of an iteration, shuffled and dealt out to its updates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loopfast.seeds import generator
from loopfast.training.run import Run
from loopfast.training.state import Rollout, TrainState

Pairs = tuple[Tensor, Tensor]
"""``(rows [M], steps [M])``, int64 on the CPU: which transitions of which trajectories."""


def update_pairs(run: Run, state: TrainState, rollout: Rollout) -> list[Pairs]:
    """The pairs of each update that an iteration has still to make.

    Pairs are shuffled and cut as if a prompt that is not kept had not been sampled.
    """
    config = run.config
    _, trained = run.steps.drawn(config.run.seed, state.iteration)
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
            run.drawn,
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
    drawn: int | None = None,
) -> Iterator[Pairs]:
    """The (row, step) pairs of a pass over an iteration, shuffled together and dealt out to its updates.

    The loss is a mean over pairs. Where fewer steps are ``drawn`` than there are, each trajectory contributes equally
    many, drawn without replacement, each step being as likely as any other: the mean over what is drawn then has
    the mean over all pairs as its expectation, and so has its gradient, without weights. Drawn anew in every pass, the
    steps that one pass leaves out are in another.

    Args:
        count: N, the number of trajectories.
        steps: the transitions that are trained on.
        updates: how many parts to cut the pairs into; their sizes differ by one at most.
        seed, iteration, epoch: of the run; they determine the draw and the order.
        drawn: how many of each trajectory's steps; None: all.

    Yields:
        ``(rows [M], steps [M])`` int64 on the CPU, once per update.
    """
    transitions = torch.tensor(steps, dtype=torch.int64)
    if drawn is not None and drawn < len(steps):
        keys = torch.rand(count, len(steps), generator=generator(seed, "steps", iteration, epoch))
        chosen = transitions[keys.argsort(1)[:, :drawn]].T.flatten()
    else:
        chosen = transitions.repeat_interleave(count)
    order = torch.randperm(len(chosen), generator=generator(seed, "pairs", iteration, epoch))
    for part in order.tensor_split(updates):
        yield part % count, chosen[part]
