"""LOOP, leave-one-out PPO (arXiv 2503.00897), on one page. README.md, "How LOOP works", has the same four steps.

1. Sample: K trajectories of each of G prompts, T denoising steps each (`loopfast.training.collect`).
2. Score: a reward r_i for each final image (`loopfast.training.scoring`).
3. Compare: A_i = (r_i − mean of the other K − 1 rewards of its prompt) / standard deviation.
4. Update: for (trajectory, step) pairs of all of them, shuffled, PPO's clipped step on
   max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)),  ρ = p_now(x_{t-1} | x_t) / p_then(x_{t-1} | x_t).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from loopfast.config import Config
from loopfast.reporting import write_report
from loopfast.run.console import Display
from loopfast.system.files import writing
from loopfast.system.memory import memory_used
from loopfast.training.batch import Batch, draw_batch
from loopfast.training.callbacks import Callback, call_back
from loopfast.training.checks import check_ratio, explained, warn_of_overflows
from loopfast.training.collect import collect
from loopfast.training.facts import announce, conclude
from loopfast.training.loss import PolicyLoss, compare
from loopfast.training.measure import evaluated, record
from loopfast.training.metrics import iteration_metrics
from loopfast.training.objects import ProgramObjects
from loopfast.training.pairs import Pairs, update_pairs
from loopfast.training.probe import fit_training_calls
from loopfast.training.run import Run
from loopfast.training.saving import save, saved_on_failure
from loopfast.training.setup import start
from loopfast.training.state import TrainState
from loopfast.training.update import UpdateStatistics, screen, update
from loopfast.training.update_pass import UpdatePass

# Screening pays off if more than a third of the pairs have no gradient, or a little more if a forward pass costs over
# half of a backward pass. As a margin, this share is required of the previous update.
SCREENING_SHARE = 0.4

# An update's last call is padded to a multiple of this: few batch sizes, as libraries plan for each one, and little
# wasted work.
PADDING = 16


def train(
    config: Config,
    *,
    resume: str | None = None,
    display: Display,
    objects: ProgramObjects | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Trains a policy by a configuration, together with the other processes of its launch.

    Args:
        config: the configuration.
        resume: ``auto`` for the newest good checkpoint, or a checkpoint's path. A resumed run continues as if it had
            not stopped. None starts a new run, except that a launch restarted by ``torchrun`` resumes its run.
        display: shows progress on rank 0.
        objects: objects of a Python program that the configuration refers to by name.
        callbacks: called after every iteration.

    Returns:
        The run's folder.

    Raises:
        LoopfastError: the run cannot start or continue; the message says why. Saved files stay.
        Interrupted: a signal stopped the run, whose state is saved.
    """
    with start(config, resume, display, objects) as (run, state):
        run.callbacks = callbacks
        with saved_on_failure(run, state):
            announce(run, state)
            fit_training_calls(run)
            if state.pending is not None:
                finish_iteration(run, state)  # before training: an evaluation alone
            while not finished(run, state):
                iterate(run, state)
                finish_iteration(run, state)
            export(run, state)
        run.close_tracker()
        return run.folder.path


def finished(run: Run, state: TrainState) -> bool:
    """Returns whether all iterations are done, or a callback has asked to stop."""
    return state.stopped or state.iteration >= run.config.train.iterations


def iterate(run: Run, state: TrainState) -> None:
    """Runs one iteration of LOOP, or the rest of one that was interrupted between two updates."""
    run.meter.start()
    batch = draw_batch(run, state.iteration)
    while True:
        if state.rollout is None:
            state.rollout = collect(run, state, batch)  # 1. sample  2. score
        try:
            learn(run, state, batch)  # 3. compare  4. update
            return
        except Resized:
            # No update has used these images. New ones are sampled in calls of the updates' size.
            state.discard_rollout()


def learn(run: Run, state: TrainState, batch: Batch) -> None:
    """Makes the remaining updates of an iteration on its rollout."""
    rollout, algorithm, device = state.rollout, run.config.algorithm, run.sampler.policy.device
    assert rollout is not None
    run.meter.start()
    # The copy becomes the history when the iteration is complete, so that a resumed one counts its rewards once.
    history = copy.deepcopy(state.statistics)
    # A_i = (r_i − mean of the other K − 1) / std, for kept prompts
    advantages = compare(algorithm, rollout.rewards, rollout.kept, batch.texts, history, device)
    # max(−A ρ, −A clip(ρ, 1 ± ε)) + kl_weight · KL, by one fused op with its gradient
    loss = PolicyLoss(algorithm, advantages)
    update_pass = UpdatePass(
        run.sampler, loss, rollout.trajectories, batch.conditioning, batch.prompt_index.to(device), run.world
    )
    for pairs in update_pairs(run, state, rollout):
        with run.phase("replay"), explained(run, state, batch):
            done = update_with_fallback(run, state, update_pass, pairs)
        warn_of_overflows(run, state, done)
        if state.updates:
            state.zero_gradient = done.zero_gradient
        state.updates.append(asdict(done))
        run.check_stop()
    state.account(run.meter.stop())
    state.latest = rollout if run.callbacks else None
    state.complete(iteration_metrics(run, state), history)


class Resized(Exception):  # noqa: N818 - a way out, not an error
    """Updates take fewer rows per model call than the rollout did, so that its images must be sampled anew."""


def update_with_fallback(
    run: Run, state: TrainState, update_pass: UpdatePass, pairs: Pairs
) -> UpdateStatistics:
    """Takes one optimizer step on the mean loss of M pairs, in model calls that fit into memory.

    Each call computes the policy's prediction, log p, ρ, the clipped loss and its gradient
    (`loopfast.training.update_pass`). Then AdamW takes a step (`loopfast.engines`). If it pays off, pairs without a
    gradient are found first and skipped.

    Raises:
        Resized: the first update's calls would be smaller than the rollout's, so that the ratio would not be exactly 1.
    """
    screening, first = None, not state.updates
    # The first update's calls have the rollout's size, for a ratio of exactly 1. A compiled model has one size.
    padding = None if first or run.config.model.compile != "off" else PADDING
    # In the first update the ratio is 1, so that no pair is clipped.
    wanted = run.screening == "on" or (run.screening == "auto" and state.zero_gradient > SCREENING_SHARE)
    if wanted and not first:
        screening = run.microbatches.with_oom_fallback(
            _screening_call(run), lambda rows: screen(update_pass, pairs, microbatch=rows, padding=padding)
        )

    def attempt(rows: int) -> UpdateStatistics:
        if run.microbatches.shared and first and rows != run.sampler.microbatch:
            raise Resized
        return update(
            update_pass,
            run.engine,
            pairs,
            microbatch=rows,
            padding=padding,
            screening=screening,
            before_step=partial(check_ratio, run, state),
        )

    return run.microbatches.with_oom_fallback("train", attempt)


def _screening_call(run: Run) -> Literal["rollout", "train"]:
    """Returns the call whose rows screening uses: the larger of the sizes that fit on the policy's device."""
    sizes = run.microbatches
    return "rollout" if run.sampler.rollout_copy is None and sizes.rollout > sizes.train else "train"


def finish_iteration(run: Run, state: TrainState) -> None:
    """Evaluates the policy and saves a checkpoint at their intervals, and writes the iteration's metrics."""
    config, metrics, result = run.config, state.pending, None
    assert metrics is not None
    if state.iteration == 0 or finished(run, state) or _due(state.iteration, config.evaluation.every):
        result = evaluated(run, state, metrics)
    if call_back(run, state, metrics):
        state.stopped = True
        result = result or evaluated(run, state, metrics)
    state.latest = None
    metrics["seconds"] = state.elapsed
    memory = memory_used(run.sampler.policy.device)
    metrics |= {name: int(run.world.max(size)) for name, size in memory.items()}
    run.world.on_main(lambda: record(run, state, result, metrics))
    run.display.advance(metrics)
    state.pending = None
    if finished(run, state) or _due(state.iteration, config.checkpoint.every):
        began = time.perf_counter()
        with run.phase("checkpoint"):
            save(run, state, None if result is None else result.reward)
        # This iteration's line is already written, so the next one gets the seconds.
        state.add({"seconds_checkpoint": time.perf_counter() - began})
    run.check_stop()


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration > 0 and iteration % every == 0


def export(run: Run, state: TrainState) -> None:
    """Exports the model, writes the report, and shows a summary."""
    path = run.folder.path
    exported = path / ("model" if run.config.model.tune == "full" else "lora")
    with run.engine.ema_weights():
        weights = run.engine.weights()

        def write() -> Path:
            with writing(path):
                run.sampler.policy.export(exported, weights)
                return write_report(path)

        report = run.world.on_main(write)
    if run.world.is_main:
        conclude(run, state, exported, report)
