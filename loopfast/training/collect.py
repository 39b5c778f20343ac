"""Samples an iteration's trajectories and scores their images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from loopfast.distributed.group import Group
from loopfast.rewards import Scores
from loopfast.rollout.trajectories import Trajectories
from loopfast.training.batch import Batch
from loopfast.training.metrics import rollout_metrics
from loopfast.training.run import Run
from loopfast.training.state import Rollout, TrainState


def collect(run: Run, state: TrainState, batch: Batch) -> Rollout:
    """Samples K trajectories of each prompt, and scores their images as they come; in calls that memory suffices for.

    Raises:
        Stopped: a signal has come.
        RewardError: a reward failed, or fewer pairs are left than there are updates.
        RewardMemoryError: a reward ran out of memory.
        LoopfastError: memory does not suffice for the smallest call.
    """
    run.meter.start()
    run.scoring.iteration = state.number
    with run.phase("rollout"):
        trajectories, scores = run.microbatches.fitting(
            "rollout", lambda rows: _sampled(run, state, batch, rows)
        )
    if run.config.trajectories.device == "host":
        trajectories = trajectories.to_host()
    trajectories, scores = gathered(run.group, trajectories, scores, len(batch.seeds))
    rollout = Rollout(trajectories, *run.scoring.rewards(scores, batch.texts, run.drawn))
    state.metrics |= rollout_metrics(run.config, scores, rollout)
    state.images += len(batch.seeds)
    return rollout


def _sampled(run: Run, state: TrainState, batch: Batch, rows: int) -> tuple[Trajectories, Scores]:
    """This process's trajectories and their images' scores, in calls of so many rows."""
    sampler = run.resize(rows)
    own = run.group.part(len(batch.seeds))
    prompt_index, seeds = batch.prompt_index[own], batch.seeds[own]
    prompts = [batch.prompts[index] for index in prompt_index.tolist()]
    schedule, _ = run.steps.drawn(run.config.run.seed, state.iteration)
    trajectories = sampler.allocate(len(seeds), schedule)
    with (
        run.scoring.together(),
        run.scoring.scorer(run.reward_worker, sampler.decode, partial(run.phase, "reward")) as scorer,
    ):
        sampling = sampler.stream(
            trajectories,
            batch.conditioning,
            prompt_index,
            seeds,
            schedule=schedule,
            between=run.check_stop,
            calls=_calls(run.group, len(batch.seeds), rows),
        )
        with closing(sampling):
            for part in sampling:
                scorer.submit(trajectories.final[part], prompts[part])
        return trajectories, scorer.result()


def _calls(group: Group, count: int, rows: int) -> int:
    """Model calls that ``count`` rows of all processes take: as many in each."""
    most = max(part.stop - part.start for part in group.parts(count))
    return -(-most // rows)


def gathered(
    group: Group, trajectories: Trajectories, scores: Scores, count: int
) -> tuple[Trajectories, Scores]:
    """The scores and log-probabilities of all processes' rows, beside this one's latents.

    Args:
        group: the processes.
        trajectories, scores: of this process's rows.
        count: N, of all rows.
    """
    own = group.part(count)
    rows = torch.arange(own.start, own.stop)
    total = group.gather(scores.total, rows, count)
    parts = {name: group.gather(part, rows, count) for name, part in scores.parts.items()}
    logprob = group.gather(trajectories.logprob.T, rows, count).T.contiguous()
    return replace(trajectories, logprob=logprob, first=own.start), Scores(total, parts)
