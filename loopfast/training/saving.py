"""Saves the state of a run to a checkpoint, and restores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import (
    CallbackError,
    CheckpointError,
    Interrupted,
    LoopfastError,
    RewardError,
    WriteError,
)
from loopfast.rewards import RewardMemoryError
from loopfast.rollout.trajectories import Trajectories
from loopfast.run.checkpoints import Checkpoint
from loopfast.training.batch import draw_prompts
from loopfast.training.identity import changed, describe_changes, prompts_identity, sampled_identity
from loopfast.training.run import Run, Stopped
from loopfast.training.state import Rollout, TrainState

_SAVED = ("iteration", "images", "seconds", "pending", "metrics", "updates")


def save(run: Run, state: TrainState, score: float | None = None) -> Path:
    """Writes a checkpoint of the present state, between two updates. All ranks call it.

    Args:
        run: the parts of the run.
        state: the state to save.
        score: the evaluation's reward. None if this state was not evaluated.
    """
    rollout = state.rollout
    if run.meter.running and rollout is not None:
        state.account(run.meter.stop())
    state.seconds = state.elapsed
    tensors, engine = run.engine.state()
    if rollout is not None:
        trajectories, world = rollout.trajectories, run.world
        latents = [
            world.gather(part, trajectories.rows, trajectories.count)
            for part in (trajectories.latents if world.size > 1 else ())
        ]
        tensors["trajectories"] = {
            "latents": torch.stack([part.cpu() for part in latents]) if latents else trajectories.latents,
            "logprob": trajectories.logprob,
            "rewards": rollout.rewards,
        }
    plain = {
        "data": _data_identity(run),
        "sampled": _sampled_identity(run, state) if rollout is not None else {},
        "engine": engine,
        "microbatch": run.microbatches.state_dict(),
        "prompt_statistics": state.statistics.state_dict(),
        "zero_gradient": state.zero_gradient,
        **{name: getattr(state, name) for name in _SAVED},
    }
    path = run.world.on_main(
        lambda: run.folder.checkpoints.save(state.iteration, len(state.updates), tensors, plain, score)
    )
    state.saved = state.position, path
    return path


def save_once(run: Run, state: TrainState) -> Path:
    """Returns the checkpoint of the present state, and writes it if it does not exist."""
    if state.saved is not None and state.saved[0] == state.position:
        return state.saved[1]
    return save(run, state)


@contextmanager
def saved_on_failure(run: Run, state: TrainState) -> Iterator[None]:
    """Context of a run's work, which saves the state when a signal, a reward, a callback or a full disk ends the work.

    Raises:
        Interrupted: a signal stopped the run.
        CallbackError, RewardError, RewardMemoryError, WriteError: raised by the work; the message names the checkpoint.
    """
    try:
        yield
    except BaseException as error:
        # On a full disk this fails, too. The first error says more.
        with suppress(LoopfastError):
            run.close_tracker()
        if isinstance(
            error, CallbackError | RewardError | RewardMemoryError | WriteError
        ) and run.raised_on_all_ranks(error):
            raise _with_state_saved(error, run, state) from error
        if not isinstance(error, Stopped):
            raise
        interrupted = Interrupted(f"stopped; {_saved(run, state)}", run.stop.exit_code)
        interrupted.on_all_ranks = True
        raise interrupted from None


def _saved(run: Run, state: TrainState) -> str:
    return f"{save_once(run, state)} is saved, --resume auto goes on from there"


def _with_state_saved(error: LoopfastError, run: Run, state: TrainState) -> LoopfastError:
    """Saves the state, and returns the error with the checkpoint in its message. All ranks call it."""
    try:
        saved = _saved(run, state)
    except LoopfastError as unsaved:
        saved = str(unsaved)
    extended = type(error)(f"{error}; {saved}")
    extended.on_all_ranks = run.world.size > 1
    return extended


def restored(run: Run, checkpoint: Checkpoint | None) -> TrainState:
    """Restores the weights and the optimizer from a checkpoint, and returns its state. None gives a new state.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    if checkpoint is None:
        return TrainState()
    plain, tensors = checkpoint.state, checkpoint.tensors
    try:
        run.engine.load_state(tensors, plain["engine"])
        run.microbatches.load_state_dict(plain.get("microbatch", {}))
        run.resize(run.microbatches.rollout)
        state = TrainState(
            **{name: plain[name] for name in _SAVED}, zero_gradient=plain.get("zero_gradient", 0.0)
        )
        state.statistics.load_state_dict(plain["prompt_statistics"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} cannot be resumed: {error}") from error
    if _sampled_anew(run, state, checkpoint):
        state.metrics, state.updates = {}, []
    else:
        state.rollout = _stored_rollout(run, tensors)
    state.began -= state.seconds
    return state


def _sampled_anew(run: Run, state: TrainState, checkpoint: Checkpoint) -> bool:
    """Returns whether the stored trajectories belong to other prompts or rewards, and warns about the changes."""

    def compared() -> bool:
        data = changed(checkpoint.state.get("data", {}), _data_identity(run))
        stored = checkpoint.state.get("sampled")
        sampled = changed(stored, _sampled_identity(run, state)) if stored else []
        if not (data or sampled):
            return False
        consequence = (
            f"iteration {state.iteration + 1} is sampled anew"
            if sampled
            else "the run goes on with the present ones"
        )
        run.display.warning(
            f"{describe_changes([*sampled, *data])} than when {checkpoint.path.name} was saved; {consequence}"
        )
        return bool(sampled)

    return run.world.on_main(compared)


def _stored_rollout(run: Run, tensors: Mapping[str, Mapping[str, Tensor]]) -> Rollout | None:
    """Returns the stored rollout, each rank its own rows. None if the checkpoint has none."""
    stored, world = tensors.get("trajectories", {}), run.world
    known = world.on_main(
        lambda: (
            (stored["logprob"], stored["rewards"], stored["latents"].shape, stored["latents"].dtype)
            if stored
            else None
        )
    )
    if known is None:
        return None
    logprob, rewards, shape, dtype = known
    own, device = world.shard(shape[1]), run.sampler.policy.device
    latents = torch.stack(
        [
            world.broadcast(stored["latents"][step] if stored else torch.empty(shape[1:], dtype=dtype))[own]
            for step in range(shape[0])
        ]
    )
    trajectories = Trajectories(latents.to(device), logprob.to(device), own.start)
    on_host = run.config.trajectories.device == "host"
    return Rollout(trajectories.to_host() if on_host else trajectories, rewards, rewards.isfinite().all(1))


def _data_identity(run: Run) -> dict[str, str]:
    """Returns digests of the configured prompts and rewards as they are now."""
    prompts = {"prompts.source": prompts_identity(run.prompts)}
    if run.config.evaluation.prompts is not None:
        prompts["evaluation.prompts"] = prompts_identity(run.evaluation_prompts)
    return prompts | run.reward_identity


def _sampled_identity(run: Run, state: TrainState) -> dict[str, Any]:
    """Returns digests of everything that determines the iteration's trajectories and rewards now."""
    schedule, trained = run.steps.for_iteration(run.config.run.seed, state.iteration)
    shape = run.sampler.policy.latent_shape
    prompts = draw_prompts(run, state.iteration)
    return sampled_identity(prompts, run.reward_identity, schedule, trained, shape)
