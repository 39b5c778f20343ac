"""Makes the parts of a run from its configuration, and ends them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from loopfast.config import Config
from loopfast.distributed.launcher import read_launch_environment
from loopfast.distributed.rendezvous import connected, is_elastic_restart, mark_opened
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.engines import Engine, build_engine, require_settings, require_type
from loopfast.errors import ConfigError
from loopfast.policies import Policy, load_policy, load_schedule, scheduler_notes
from loopfast.profiling import Meter
from loopfast.prompts import load_prompts
from loopfast.rollout import Sampler, StepCache, StochasticSteps, make_rollout_copy, stochastic_steps
from loopfast.run.checkpoints import Checkpoint
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.run.lock import locked
from loopfast.run.tracking import Tracker
from loopfast.schedules import TransitionSchedule
from loopfast.system.device import CUBLAS_WORKSPACE, CUBLAS_WORKSPACES, torch_device
from loopfast.system.interrupts import StopRequest
from loopfast.training.identity import reward_identity
from loopfast.training.microbatch import Microbatches, start_size
from loopfast.training.objects import ProgramObjects
from loopfast.training.run import Run
from loopfast.training.saving import restored
from loopfast.training.scoring import Scoring
from loopfast.training.state import TrainState

# Seconds in which a launcher may repeat a signal that its processes have already received.
PASSING_ON = 2.0


@contextmanager
def start(
    config: Config, resume: str | None, display: Display, objects: ProgramObjects | None = None
) -> Iterator[tuple[Run, TrainState]]:
    """Context of a run with the other processes of its launch. It gives the run's parts and its state.

    Args:
        config: the configuration.
        resume: ``auto`` for the newest good checkpoint, or a checkpoint's path. None starts a new run, except that a
            launch restarted by ``torchrun`` resumes its run.
        display: shows progress on rank 0.
        objects: objects of a Python program that the configuration refers to by name.

    Raises:
        LoopfastError: the run cannot start.
    """
    objects = objects or ProgramObjects()
    objects.check(config)
    launch_env = read_launch_environment(os.environ)
    with (
        StopRequest(0.0 if launch_env.size == 1 else PASSING_ON) as stop,
        processes(config, stop) as world,
        ExitStack() as ends,
    ):
        display = display if world.is_main else Display.silent()
        folder = RunFolder(config)
        world.on_main(lambda: ends.enter_context(locked(folder.path, display.warning)))
        if resume is None and is_elastic_restart(launch_env):
            resume = "auto"
        for note in objects.notes():
            display.warning(note)
        world.on_main(lambda: objects.write(folder, resume))
        run, state = _prepared(config, resume, display, stop, world, folder, objects, ends)
        mark_opened(launch_env)
        yield run, state


@contextmanager
def processes(config: Config, stop: StopRequest) -> Iterator[World]:
    """Context of a run's processes, which the launcher has started.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
        LoopfastError: another process did not connect in time.
        PeerError: another process has ended or does not answer.
    """
    launch_env = read_launch_environment(os.environ)
    if config.model.deterministic:
        # cuBLAS reads this when CUDA starts.
        os.environ.setdefault(CUBLAS_WORKSPACE, CUBLAS_WORKSPACES[0])
    if not config.distributed.needs_deepspeed(launch_env.size):
        yield SINGLE_PROCESS
        return
    device = torch_device(config.model.device)
    require_type(config.model.dtype, config.distributed.zero_stage, device.type)
    require_settings(config.train, config.distributed, config.model.dtype, device.type)
    with connected(launch_env, device, config.distributed.timeout, lambda: stop.requested) as world:
        yield world


def _prepared(
    config: Config,
    resume: str | None,
    display: Display,
    stop: StopRequest,
    world: World,
    folder: RunFolder,
    objects: ProgramObjects,
    ends: ExitStack,
) -> tuple[Run, TrainState]:
    """Makes the parts of a run and its state: quick checks first, parts that take memory last."""
    prompts = load_prompts(config.prompts.source)
    evaluation_prompts = load_prompts(config.evaluation.prompts or config.prompts.source)
    reward, rollout, warn = config.reward, config.rollout, display.warning
    scoring = Scoring(reward, rollout, world, folder, warn, tf32=config.model.tf32, functions=objects.rewards)
    ends.callback(scoring.close)
    schedule = load_schedule(config.model, rollout)
    for note in scheduler_notes(config.model):
        warn(note)
    steps = stochastic_steps(schedule, rollout.stochastic_steps, config.train.steps)
    trained_per_trajectory = _trained_per_trajectory(config, steps, world)
    identity = reward_identity(reward)
    checkpoint = _opened(folder, resume, display, world)

    policy = _policy(config, [p.text for p in (*prompts, *evaluation_prompts)], new=checkpoint is None)
    microbatches = Microbatches(
        rollout.microbatch,
        config.train.microbatch,
        start_size(-(-config.images_per_iteration // world.size), policy.latent_shape, policy.device),
        warn,
        release=lambda: run.sampler.release(),
        retries=not config.distributed.needs_deepspeed(world.size),
    )
    sampler, engine = _sampler_and_engine(config, policy, schedule, microbatches.rollout, display, world)
    run = Run(
        config=config,
        display=display,
        stop=stop,
        world=world,
        folder=folder,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        scoring=scoring,
        reward_identity=identity,
        steps=steps.to(policy.device),
        trained_per_trajectory=trained_per_trajectory,
        microbatches=microbatches,
        sampler=sampler,
        engine=engine,
        meter=Meter([policy.device, sampler.model.device]),
    )
    ends.callback(lambda: run.sampler.release())
    state = restored(run, checkpoint)
    if world.is_main:
        resume_at = None if checkpoint is None else state.iteration - (state.pending is not None)
        run.tracker = Tracker(folder.path, config.run.trackers, resume_at=resume_at, warn=warn)
    return run, state


def _opened(folder: RunFolder, resume: str | None, display: Display, world: World) -> Checkpoint | None:
    """Prepares the run's folder and reads the checkpoint to resume, on rank 0. Other ranks get it without tensors."""
    found: list[Checkpoint] = []

    def opened() -> Checkpoint | None:
        checkpoint = folder.open(resume, display)
        if checkpoint is None:
            return None
        found.append(checkpoint)
        return replace(checkpoint, tensors={})

    checkpoint = world.on_main(opened)
    return found[0] if found else checkpoint


def _policy(config: Config, texts: list[str], *, new: bool) -> Policy:
    """Loads the policy for prompts with these texts. A new run's policy starts from ``model.lora.from``, if set."""
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
    world: World,
) -> tuple[Sampler, Engine]:
    """Makes the sampler, with ``rows`` per call, and the engine, which owns the policy's weights from now on."""
    # The copy is made before the engine shards the weights.
    rollout_copy = make_rollout_copy(policy, config.rollout, sharded=config.distributed.zero_stage == 3)
    sampler = Sampler(
        policy,
        schedule.to(policy.device),
        config.rollout.guidance_scale,
        config.algorithm.logprob,
        rows,
        rollout_copy,
        StepCache(capture=config.rollout.cuda_graph, warn=display.warning),
    )
    engine = build_engine(policy, config.train, config.distributed, world)
    if rollout_copy is not None:
        rollout_copy.gathered = engine.gathered
    elif engine.sharded:
        # The addresses of gathered weights change with every call, so that nothing can be captured.
        sampler = replace(sampler, steps=StepCache(capture=False))
    return sampler, engine


def _trained_per_trajectory(config: Config, steps: StochasticSteps, world: World) -> int:
    """Returns the number of steps of a trajectory that each pass trains on."""
    train, count = config.train, steps.count
    trained = train.trained_per_trajectory(count)
    if trained < 1:
        raise ConfigError(
            f"train.step_fraction: found {train.step_fraction:g}, allowed: at least {0.5 / count:.3g}, with which "
            f"one of {count} trained steps is drawn"
        )
    images = config.images_per_iteration
    if images < world.size:
        raise ConfigError(
            f"rollout.prompts_per_iteration x algorithm.samples_per_prompt: found {images} image(s), allowed: at "
            f"least {world.size}, one for each process"
        )
    if (pairs := images * trained) < train.updates_per_iteration:
        raise ConfigError(
            f"train.updates_per_iteration: found {train.updates_per_iteration}, allowed: at most {pairs}, the "
            f"number of (image, step) pairs in an iteration"
        )
    return trained
