"""Makes the parts of a run from its configuration, and ends them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from loopfast.config import Config
from loopfast.distributed.group import ALONE, Group
from loopfast.distributed.launcher import find_place
from loopfast.distributed.rendezvous import abandon, joined, leave, note_opened, opened_before
from loopfast.engines import Engine, build_engine, require_settings, require_type
from loopfast.errors import ConfigError
from loopfast.policies import Policy, load_policy, load_schedule, scheduler_notes
from loopfast.profiling import Meter
from loopfast.prompts import load_prompts
from loopfast.rollout import Sampler, StepCache, StochasticSteps, make_replica, stochastic_steps
from loopfast.run.checkpoints import Checkpoint
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.run.lock import locked
from loopfast.run.tracking import Tracker
from loopfast.schedules import TransitionSchedule
from loopfast.system.device import CUBLAS_WORKSPACE, CUBLAS_WORKSPACES, torch_device
from loopfast.system.interrupts import StopRequest
from loopfast.training.given import Given
from loopfast.training.identity import reward_identity
from loopfast.training.microbatch import Microbatches, start_size
from loopfast.training.run import Run
from loopfast.training.saving import restored
from loopfast.training.scoring import Scoring
from loopfast.training.state import TrainState

# Seconds in which a launcher passes on a signal that its processes have had already.
PASSING_ON = 2.0


@contextmanager
def start(
    config: Config, resume: str | None, display: Display, given: Given | None = None
) -> Iterator[tuple[Run, TrainState]]:
    """Context of a run, together with the other processes of its launch: its parts, and where it stands.

    Args:
        config: the run.
        resume: None for a new run, ``auto`` for its newest good checkpoint, or a checkpoint's path. A launch that
            ``torchrun`` has started anew goes on with its run.
        display: where progress is shown, by the first process.
        given: objects of a Python program that the configuration has names for.

    Raises:
        LoopfastError: the run cannot start.
    """
    given = given or Given()
    given.check(config)
    place = find_place(os.environ)
    with (
        StopRequest(0.0 if place.size == 1 else PASSING_ON) as stop,
        processes(config, stop) as group,
        ExitStack() as ends,
    ):
        display = display if group.first else Display.silent()
        folder = RunFolder(config)
        group.on_first(lambda: ends.enter_context(locked(folder.path, display.warning)))
        if resume is None and opened_before(place):
            resume = "auto"
        for note in given.notes():
            display.warning(note)
        group.on_first(lambda: given.write(folder, resume))
        run, state = _prepared(config, resume, display, stop, group, folder, given, ends)
        note_opened(place)
        yield run, state


@contextmanager
def processes(config: Config, stop: StopRequest) -> Iterator[Group]:
    """Context of the processes that this one's launcher has started with it, while a run goes on.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
        LoopfastError: they do not all come.
        PeerError: one of them has ended, or does not answer.
    """
    place = find_place(os.environ)
    if config.model.deterministic:
        # before the processes of a group start CUDA
        os.environ.setdefault(CUBLAS_WORKSPACE, CUBLAS_WORKSPACES[0])
    if not config.distributed.needs_deepspeed(place.size):
        yield ALONE
        return
    device = torch_device(config.model.device)
    require_type(config.model.dtype, config.distributed.zero_stage, device.type)
    require_settings(config.train, config.distributed, config.model.dtype, device.type)
    group = joined(place, device, config.distributed.timeout)
    try:
        with group.explained(lambda: stop.requested):
            yield group
    except BaseException:
        abandon(group)
        raise
    leave(group)


def _prepared(
    config: Config,
    resume: str | None,
    display: Display,
    stop: StopRequest,
    group: Group,
    folder: RunFolder,
    given: Given,
    ends: ExitStack,
) -> tuple[Run, TrainState]:
    """The parts of a run and its state; what takes little time to find wrong comes first, what takes memory last."""
    prompts = load_prompts(config.prompts.source)
    evaluation_prompts = load_prompts(config.evaluation.prompts or config.prompts.source)
    scoring = Scoring(config, group, folder, display.warning, given.rewards)
    ends.callback(scoring.close)
    schedule = load_schedule(config.model, config.rollout)
    for note in scheduler_notes(config.model):
        display.warning(note)
    steps = stochastic_steps(schedule, config.rollout.stochastic_steps, config.train.steps)
    drawn = _steps_drawn(config, steps, group)
    identity = reward_identity(config.reward)
    checkpoint = _opened(folder, resume, display, group)

    policy = _policy(config, [p.text for p in (*prompts, *evaluation_prompts)], new=checkpoint is None)
    microbatches = Microbatches(
        config.rollout.microbatch,
        config.train.microbatch,
        start_size(-(-config.images_per_iteration // group.size), policy.latent_shape, policy.device),
        display.warning,
        release=lambda: run.sampler.release(),
        retries=not config.distributed.needs_deepspeed(group.size),
    )
    sampler, engine = _sampler_and_engine(config, policy, schedule, microbatches.rollout, display, group)
    run = Run(
        config=config,
        display=display,
        stop=stop,
        group=group,
        folder=folder,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        scoring=scoring,
        reward_identity=identity,
        steps=steps.to(policy.device),
        drawn=drawn,
        microbatches=microbatches,
        sampler=sampler,
        engine=engine,
        meter=Meter([policy.device, sampler.model.device]),
    )
    ends.callback(lambda: run.sampler.release())
    state = restored(run, checkpoint)
    if group.first:
        resume_at = None if checkpoint is None else state.iteration - (state.pending is not None)
        run.tracker = Tracker(folder.path, config.run.trackers, resume_at=resume_at, warn=display.warning)
    return run, state


def _opened(folder: RunFolder, resume: str | None, display: Display, group: Group) -> Checkpoint | None:
    """The run's folder is prepared, and a checkpoint to go on from read, by the first process.

    The others get all of it but the tensors.
    """
    found: list[Checkpoint] = []

    def opened() -> Checkpoint | None:
        checkpoint = folder.open(resume, display)
        if checkpoint is None:
            return None
        found.append(checkpoint)
        return replace(checkpoint, tensors={})

    checkpoint = group.on_first(opened)
    return found[0] if found else checkpoint


def _policy(config: Config, texts: list[str], *, new: bool) -> Policy:
    """The policy of a run, whose prompts are the texts; a new one starts from ``model.lora.from``, if anywhere."""
    stage = config.distributed.zero_stage
    policy = load_policy(
        config.model,
        seed=config.run.seed,
        keep_reference=config.algorithm.kl_weight > 0,
        cast=stage > 0,
        sharded=stage == 3,
        start=new,
    )
    if config.train.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if config.model.free_text_encoder:
        policy.free_text_encoder(texts)
    return policy


def _sampler_and_engine(
    config: Config,
    policy: Policy,
    schedule: TransitionSchedule,
    rows: int,
    display: Display,
    group: Group,
) -> tuple[Sampler, Engine]:
    """How a policy is sampled, in calls of so many rows; and what owns its weights from now on."""
    # before the engine takes the weights apart
    replica = make_replica(policy, config.rollout, sharded=config.distributed.zero_stage == 3)
    sampler = Sampler(
        policy,
        schedule.to(policy.device),
        config.rollout.guidance_scale,
        config.algorithm.logprob,
        rows,
        replica,
        StepCache(capture=config.rollout.cuda_graph, warn=display.warning),
    )
    engine = build_engine(policy, config.train, config.distributed, group)
    if replica is not None:
        replica.gathered = engine.gathered
    elif engine.sharded:
        # gathered weights lie elsewhere in every call
        sampler = replace(sampler, steps=StepCache(capture=False))
    return sampler, engine


def _steps_drawn(config: Config, steps: StochasticSteps, group: Group) -> int:
    """How many steps of a trajectory each pass trains on."""
    train, count = config.train, steps.count
    drawn = train.steps_drawn(count)
    if drawn < 1:
        raise ConfigError(
            f"train.step_fraction: found {train.step_fraction:g}, allowed: at least {0.5 / count:.3g}, with which "
            f"one of {count} trained steps is drawn"
        )
    images = config.images_per_iteration
    if images < group.size:
        raise ConfigError(
            f"rollout.prompts_per_iteration x algorithm.samples_per_prompt: found {images} image(s), allowed: at "
            f"least {group.size}, one for each process"
        )
    if (pairs := images * drawn) < train.updates_per_iteration:
        raise ConfigError(
            f"train.updates_per_iteration: found {train.updates_per_iteration}, allowed: at most {pairs}, the "
            f"number of (image, step) pairs in an iteration"
        )
    return drawn
