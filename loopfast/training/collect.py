"""Samples an iteration's trajectories and scores their images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from loopfast.distributed.world import World
from loopfast.rewards import Scores
from loopfast.rollout.trajectories import Trajectories
from loopfast.training.batch import Batch
from loopfast.training.metrics import rollout_metrics
from loopfast.training.run import Run
from loopfast.training.state import Rollout, TrainState


def collect(run: Run, state: TrainState, batch: Batch) -> Rollout:
    """Samples K trajectories of each prompt in calls that fit into memory, and scores each call's images at once.

    Raises:
        Stopped: a signal has come.
        RewardError: a reward failed, or fewer pairs are kept than there are updates.
        RewardMemoryError: a reward ran out of memory.
        LoopfastError: not even one row per call fits into memory.
    """
    run.meter.start()
    run.scoring.iteration = state.number
    with run.phase("rollout"):
        trajectories, scores = run.microbatches.with_oom_fallback(
            "rollout", lambda rows: _sampled(run, state, batch, rows)
        )
    if run.config.trajectories.device == "host":
        trajectories = trajectories.to_host()
    trajectories, scores = gathered(run.world, trajectories, scores, len(batch.seeds))
    updates = run.config.train.updates_per_iteration
    rewards, kept = run.scoring.rewards(scores, batch.texts, run.trained_per_trajectory, updates)
    rollout = Rollout(trajectories, rewards, kept)
    state.metrics |= rollout_metrics(scores, rollout, count_dropped=run.drops_bad_rewards)
    state.images += len(batch.seeds)
    return rollout


def _sampled(run: Run, state: TrainState, batch: Batch, rows: int) -> tuple[Trajectories, Scores]:
    """Returns this rank's trajectories and the scores of their images, sampled in calls of ``rows`` rows."""
    schedule, _ = run.steps.for_iteration(run.config.run.seed, state.iteration)
    sampler = replace(run.resize(rows), schedule=schedule)
    own = run.world.shard(len(batch.seeds))
    prompt_index, seeds = batch.prompt_index[own], batch.seeds[own]
    prompts = [batch.prompts[index] for index in prompt_index.tolist()]
    trajectories = sampler.allocate(len(seeds))
    with (
        run.scoring.errors_on_all_ranks(),
        run.scoring.scorer(run.reward_worker, sampler.decode, partial(run.phase, "reward")) as scorer,
    ):
        sampling = sampler.stream(
            trajectories,
            batch.conditioning,
            prompt_index,
            seeds,
            between=run.check_stop,
            calls=run.world.calls(len(batch.seeds), rows),
        )
        with closing(sampling):
            for part in sampling:
                scorer.submit(trajectories.final[part], prompts[part])
        return trajectories, scorer.result()


def gathered(
    world: World, trajectories: Trajectories, scores: Scores, count: int
) -> tuple[Trajectories, Scores]:
    """Gathers the scores and log-probabilities of all ranks. The latents stay on their ranks.

    Args:
        world: the processes.
        trajectories, scores: those of this rank's rows.
        count: N, the number of all rows.
    """
    own = world.shard(count)
    rows = torch.arange(own.start, own.stop)
    total = world.gather(scores.total, rows, count)
    parts = {name: world.gather(part, rows, count) for name, part in scores.parts.items()}
    logprob = world.gather(trajectories.logprob.T, rows, count).T.contiguous()
    return replace(trajectories, logprob=logprob, first_row=own.start), Scores(total, parts)
