"""The algorithm, on one page: sample, score, update, record."""

from __future__ import annotations

import copy
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loopfast.algorithms import ALGORITHMS, PromptStatistics
from loopfast.config import Config
from loopfast.distributed.group import ALONE, Group
from loopfast.distributed.launcher import find_place
from loopfast.distributed.rendezvous import joined, leave, note_opened, opened_before
from loopfast.engines import build_engine, require_settings, require_type
from loopfast.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    LoopfastError,
    NonFiniteError,
    RewardError,
    WriteError,
)
from loopfast.evaluation import Evaluation, evaluate
from loopfast.policies import Conditioning, load_policy, load_schedule, read_prompts, scheduler_notes
from loopfast.profiling import Category, Meter, Times, range_
from loopfast.prompts import Prompt, load_prompts
from loopfast.reporting import write_report
from loopfast.rewards import RewardMemoryError, Scores
from loopfast.rollout import Sampler, StepCache, make_replica, stochastic_steps
from loopfast.rollout.trajectories import Trajectories, shuffled_pairs
from loopfast.run.checkpoints import Checkpoint
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.run.lock import locked
from loopfast.run.tracking import Tracker, read_metrics
from loopfast.seeds import derive, row_seeds
from loopfast.system.device import torch_device
from loopfast.system.files import writing
from loopfast.system.interrupts import StopRequest
from loopfast.system.memory import memory_used
from loopfast.training.facts import describe_run
from loopfast.training.identity import (
    changed,
    describe_changes,
    prompts_identity,
    reward_identity,
    sampled_identity,
)
from loopfast.training.loss import Surrogate
from loopfast.training.microbatch import Call, Microbatches, start_size
from loopfast.training.replay import Replay, rehearse
from loopfast.training.rounding import rounding_bound
from loopfast.training.scoring import Judge, Worker
from loopfast.training.update import UpdateStatistics, screen, update

# Where a key of the configuration makes the replay's calls others than the rollout's, the ratio before the first update
# may be this far from 1; where the calls are the same, it is 1 wherever the libraries round equal calls alike.
ON_POLICY_TOLERANCE = 1e-3

# Screening pays from a share of 1/3 without a gradient, or a little more where a forward pass costs over half of a
# backward pass; what the update before had, this one may just miss.
SCREENING_SHARE = 0.4


# Seconds in which a launcher passes on a signal that its processes have had already.
PASSING_ON = 2.0

# Bytes that the rehearsal of a training call leaves free: for decoded images, rewards, and the libraries under PyTorch,
# which fail in ways of their own when a GPU is full to the last byte.
REHEARSAL_RESERVE = 2**30


# Of an update's last call: few enough sizes for libraries that prepare each one, and little work for nothing.
PADDING = 16


def train(config: Config, *, resume: str | None = None, display: Display) -> Path:
    """Trains a policy as a configuration says, together with the other processes of its launch, if any.

    Args:
        config: the run.
        resume: None for a new run, ``auto`` for its newest good checkpoint, or a checkpoint's path. A resumed run
            continues as if it had not stopped. A launch that ``torchrun`` has started anew goes on with its run.
        display: where progress is shown, by the first process.

    Returns:
        The run's folder.

    Raises:
        LoopfastError: the run cannot start or go on; the message says why. What was saved stays.
        Interrupted: a signal stopped the run, which is saved.
    """
    place = find_place(os.environ)
    stopping = StopRequest(0.0 if place.size == 1 else PASSING_ON)
    with stopping as stop, processes(config, stop) as group, ExitStack() as lock:
        display = display if group.first else Display.silent()
        folder = RunFolder(config).path
        group.on_first(lambda: lock.enter_context(locked(folder, display.warning)))
        if resume is None and opened_before(place):
            resume = "auto"
        trainer = Trainer(config, resume, display, stop, group)
        note_opened(place)
        try:
            trainer.start()
            while not trainer.finished:
                if trainer.progress.trajectories is None:
                    trainer.sample()
                trainer.update()
                trainer.record()
            trainer.finish()
        except BaseException as error:
            # on a full disk this fails too, and what came first says more
            with suppress(LoopfastError):
                trainer.close_tracker()
            if isinstance(error, RewardError | RewardMemoryError | WriteError) and trainer.together(error):
                raise _with_state_saved(error, trainer) from error
            if not isinstance(error, Stopped):
                raise
            interrupted = Interrupted(f"stopped; {_saved(trainer)}", stop.exit_code)
            interrupted.shared = True
            raise interrupted from None
        finally:
            trainer.close()
        trainer.close_tracker()
    return trainer.folder.path


def _saved(trainer: Trainer) -> str:
    return f"{trainer.saved()} is saved, --resume auto goes on from there"


def _with_state_saved(error: LoopfastError, trainer: Trainer) -> LoopfastError:
    """The error, raised by all processes of a run at once, once the run's state is saved."""
    try:
        saved = _saved(trainer)
    except LoopfastError as unsaved:
        saved = str(unsaved)
    told = type(error)(f"{error}; {saved}")
    told.shared = not trainer.group.alone
    return told


@contextmanager
def processes(config: Config, stop: StopRequest) -> Iterator[Group]:
    """The processes that this one's launcher has started with it, while a run goes on.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
        LoopfastError: they do not all come.
        PeerError: one of them has ended, or does not answer.
    """
    place = find_place(os.environ)
    if not config.distributed.needs_deepspeed(place.size):
        yield ALONE
        return
    device = torch_device(config.model.device)
    require_type(config, device.type)
    require_settings(config, device.type)
    group = joined(place, device, config.distributed.timeout)
    try:
        with group.explained(lambda: stop.requested):
            yield group
    except BaseException:
        # connections to processes that have died would be waited for: they end with this one
        group.end_watch()
        raise
    leave(group)


class _Resized(Exception):  # noqa: N818 - a way out, not an error
    """Replay takes fewer rows per model call than the rollout did."""


class Stopped(Exception):  # noqa: N818 - being stopped is not an error
    """Unwinds to where the state is saved, after a signal."""


@dataclass
class Progress:
    """Where a run stands between two updates; with the weights and the optimizer, all that a checkpoint holds.

    Attributes:
        iteration: complete iterations.
        images: sampled for training so far.
        seconds: spent so far, earlier sessions included.
        pending: metrics of the latest iteration (0: before training) as long as it is not evaluated and recorded.
        metrics: of the iteration under way.
        updates: statistics of the updates done in it.
        zero_gradient: share of pairs without a gradient in the latest update that was not an iteration's first.
        trajectories, rewards: what was sampled for it, and float32 ``[G, K]``; NaN for the images of a prompt that is
            left out of it.
    """

    iteration: int = 0
    images: int = 0
    seconds: float = 0.0
    pending: dict[str, Any] | None = field(default_factory=lambda: {"iteration": 0, "images": 0})
    metrics: dict[str, Any] = field(default_factory=dict)
    updates: list[dict[str, float]] = field(default_factory=list)
    zero_gradient: float = 0.0
    trajectories: Trajectories | None = None
    rewards: Tensor | None = None


class Trainer:
    """A run in progress: its parts, and the four things it does with them."""

    def __init__(
        self,
        config: Config,
        resume: str | None,
        display: Display,
        stop: StopRequest,
        group: Group = ALONE,
    ) -> None:
        self.config, self.display, self._stop, self.group = config, display, stop, group
        self.prompts = load_prompts(config.prompts.source)
        self.evaluation_prompts = load_prompts(config.evaluation.prompts or config.prompts.source)
        self.folder = RunFolder(config)
        self.judge = Judge(config, group, self.folder, display.warning)
        self._identity = reward_identity(config.reward)
        self.schedule = load_schedule(config.model, config.rollout)
        for note in scheduler_notes(config.model):
            display.warning(note)
        self.steps = stochastic_steps(self.schedule, config.rollout.stochastic_steps, config.train.steps)
        self.drawn = self._steps_drawn()
        checkpoint = self._open(resume)

        stage = config.distributed.zero_stage
        policy = load_policy(
            config.model,
            seed=config.run.seed,
            keep_reference=config.algorithm.kl_weight > 0,
            cast=stage > 0,
            sharded=stage == 3,
            start=checkpoint is None,
        )
        images = config.rollout.prompts_per_iteration * config.algorithm.samples_per_prompt
        if config.train.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        if config.model.free_text_encoder:
            policy.free_text_encoder([p.text for p in (*self.prompts, *self.evaluation_prompts)])
        self.microbatches = Microbatches(
            config.rollout.microbatch,
            config.train.microbatch,
            start_size(-(-images // group.size), policy.latent_shape, policy.device),
            display.warning,
            release=lambda: self.sampler.release(),
            retries=not config.distributed.needs_deepspeed(group.size),
        )
        # before the engine takes the weights apart
        replica = make_replica(policy, config.rollout, sharded=stage == 3)
        self.sampler = Sampler(
            policy,
            self.schedule.to(policy.device),
            config.rollout.guidance_scale,
            config.algorithm.logprob,
            self.microbatches.rollout,
            replica,
            StepCache(capture=config.rollout.cuda_graph, warn=display.warning),
        )
        self.steps = self.steps.to(policy.device)
        self.engine = build_engine(policy, config, group)
        if replica is not None:
            replica.whole = self.engine.whole
        elif self.engine.sharded:
            # gathered weights lie elsewhere in every call
            self.sampler = replace(self.sampler, steps=StepCache(capture=False))
        self.statistics = PromptStatistics()
        self.progress = Progress()
        self._last_saved: tuple[tuple[int, ...], Path] | None = None
        self._rounding_told = self._overflow_told = False
        self.meter = Meter([policy.device, self.sampler.model.device])
        self.times = Times(0.0)
        self._encoded: tuple[int, tuple[list[Prompt], Conditioning, Tensor]] | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        self._began = time.perf_counter() - self.progress.seconds
        resume_at = None
        if checkpoint is not None:
            resume_at = self.progress.iteration - (self.progress.pending is not None)
        self._tracker: Tracker | None = None
        if group.first:
            self._tracker = Tracker(
                self.folder.path, config.run.trackers, resume_at=resume_at, warn=display.warning
            )

    def _open(self, resume: str | None) -> Checkpoint | None:
        """The run's folder is prepared, and a checkpoint to go on from read, by the first process.

        The others get all of it but the tensors.
        """
        found: list[Checkpoint] = []

        def opened() -> Checkpoint | None:
            checkpoint = self.folder.open(resume, self.display)
            if checkpoint is None:
                return None
            found.append(checkpoint)
            return replace(checkpoint, tensors={})

        checkpoint = self.group.on_first(opened)
        return found[0] if found else checkpoint

    def _steps_drawn(self) -> int:
        """How many steps of a trajectory each pass trains on."""
        train, steps = self.config.train, self.steps.count
        drawn = train.steps_drawn(steps)
        if drawn < 1:
            raise ConfigError(
                f"train.step_fraction: found {train.step_fraction:g}, allowed: at least {0.5 / steps:.3g}, with which "
                f"one of {steps} trained steps is drawn"
            )
        rollout = self.config.rollout
        images = rollout.prompts_per_iteration * self.config.algorithm.samples_per_prompt
        if images < self.group.size:
            raise ConfigError(
                f"rollout.prompts_per_iteration x algorithm.samples_per_prompt: found {images} image(s), allowed: at "
                f"least {self.group.size}, one for each process"
            )
        pairs = images * drawn
        if pairs < train.updates_per_iteration:
            raise ConfigError(
                f"train.updates_per_iteration: found {train.updates_per_iteration}, allowed: at most {pairs}, the "
                f"number of (image, step) pairs in an iteration"
            )
        return drawn

    @property
    def screening(self) -> Literal["auto", "on", "off"]:
        """``train.screening``; off where nothing is clipped, or where a divergence gives every pair a gradient."""
        algorithm = self.config.algorithm
        possible = ALGORITHMS[algorithm.name].clip_range is not None and algorithm.kl_weight == 0
        return self.config.train.screening if possible else "off"

    @property
    def reward_worker(self) -> Worker:
        """``rollout.reward_worker``, decided where it is ``auto``."""
        worker = self.config.rollout.reward_worker
        if worker != "auto":
            return worker
        return "thread" if self.sampler.model.device.type == "cuda" else "inline"

    @property
    def finished(self) -> bool:
        """Whether all iterations are done."""
        return self.progress.iteration >= self.config.train.iterations

    def start(self) -> None:
        """Shows what is about to run, and measures the model before training."""
        facts = describe_run(self)
        self.display.header("loopfast train", facts)
        self.group.on_first(lambda: self.folder.write_summary(facts))
        if self.group.first:
            self._warn_of_cut_prompts()
        self.display.start(self.config.train.iterations, self.progress.iteration)
        # elsewhere running out of memory is not an error that can be caught
        on_gpu = self.sampler.policy.device.type == "cuda"
        if on_gpu and self.engine.retries and self.microbatches.automatic("train"):
            self._rehearse()
        if self.progress.pending is not None:
            self.record()

    def _warn_of_cut_prompts(self) -> None:
        """Says which prompts are longer than the model's text encoders read."""
        source, evaluation = self.config.prompts.source, self.config.evaluation
        read: dict[str, list[Prompt]] = {source: self.prompts}
        if evaluation.prompts is not None:
            read.setdefault(evaluation.prompts, self.evaluation_prompts[: evaluation.limit_prompts])
        for name, prompts in read.items():
            found = read_prompts(self.sampler.policy.text_limits, [prompt.text for prompt in prompts])
            if found.warning:
                self.display.warning(f"prompts {name}: {found.warning} (loopfast config check lists them)")

    def _resized(self, rows: int) -> Sampler:
        """The sampler, with ``rows`` per model call."""
        if self.sampler.microbatch != rows:
            self.sampler.release()
            self.sampler = replace(self.sampler, microbatch=rows)
        return self.sampler

    def _rehearse(self) -> None:
        """Finds out how many rows a training call can take before images are sampled for one that cannot."""
        conditioning = self.sampler.policy.encode([self.prompts[0].text])
        with_reference = self.config.algorithm.kl_weight > 0
        # the optimizer's first step allocates two float32 numbers for each trained weight
        trained = sum(parameter.numel() for parameter in self.sampler.policy.trainable().values())
        reserve = REHEARSAL_RESERVE + 8 * trained

        def attempt(rows: int) -> None:
            rehearse(
                self.sampler,
                self.engine,
                conditioning,
                microbatch=rows,
                with_reference=with_reference,
                reserve=reserve,
            )

        self.microbatches.fitting("train", attempt)

    def sample(self) -> None:
        """Draws the iteration's prompts, samples K trajectories of each, and scores the images."""
        config, progress = self.config, self.progress
        self.meter.start()
        batch, conditioning, owner = self._batch()
        seeds = row_seeds(
            config.run.seed,
            "rollout",
            progress.iteration,
            list(range(len(batch))),
            config.algorithm.samples_per_prompt,
        )
        schedule, _ = self.steps.drawn(config.run.seed, progress.iteration)
        mine = self.group.part(len(seeds))
        prompts = [batch[index] for index in owner[mine].tolist()]

        def attempt(rows: int) -> tuple[Trajectories, Scores]:
            sampler = self._resized(rows)

            def sample(finished: Callable[[slice, Tensor], None]) -> Trajectories:
                return sampler.sample(
                    conditioning,
                    owner[mine],
                    seeds[mine],
                    between=self._check_stop,
                    schedule=schedule,
                    finished=finished,
                    calls=self._calls(len(seeds), rows),
                )

            with self.judge.together():
                return self.judge.sample(
                    self.reward_worker, sample, sampler.decode, prompts, partial(self._phase, "reward")
                )

        self.judge.iteration = self._iteration
        with self._phase("rollout"):
            trajectories, scores = self.microbatches.fitting("rollout", attempt)
        if config.trajectories.device == "host":
            trajectories = trajectories.to_host()
        trajectories, scores = self._gathered(trajectories, scores, len(seeds))
        rewards = self.judge.rewards(scores, [prompt.text for prompt in batch], self.drawn)
        left = rewards.isfinite().all(1)
        progress.trajectories, progress.rewards = trajectories, rewards
        shown = scores.total.view_as(rewards)[left]
        progress.metrics |= {
            "reward_mean": shown.mean().item(),
            "reward_std": shown.std(correction=0).item(),
            "group_spread": shown.std(1, correction=0).mean().item(),
            **{
                f"reward_{name}": part.view_as(rewards)[left].mean().item()
                for name, part in scores.parts.items()
            },
        }
        if config.rollout.on_bad_reward == "drop_group":
            progress.metrics["dropped_groups"] = int((~left).sum())
        progress.images += len(seeds)

    def _calls(self, count: int, rows: int) -> int:
        """Model calls that ``count`` rows of all processes take: as many in each."""
        most = max(part.stop - part.start for part in self.group.parts(count))
        return -(-most // rows)

    def _gathered(
        self, trajectories: Trajectories, scores: Scores, count: int
    ) -> tuple[Trajectories, Scores]:
        """The scores and log-probabilities of all processes' rows, beside this one's latents."""
        mine = self.group.part(count)
        rows = torch.arange(mine.start, mine.stop)
        total = self.group.gather(scores.total, rows, count)
        parts = {name: self.group.gather(part, rows, count) for name, part in scores.parts.items()}
        logprob = self.group.gather(trajectories.logprob.T, rows, count).T.contiguous()
        return replace(trajectories, logprob=logprob, first=mine.start), Scores(total, parts)

    def update(self) -> None:
        """Takes the iteration's updates on the (row, step) pairs of what was sampled."""
        config, progress = self.config, self.progress
        trajectories, rewards = progress.trajectories, progress.rewards
        assert trajectories is not None
        assert rewards is not None
        self.meter.start()
        batch, conditioning, owner = self._batch()
        texts = [prompt.text for prompt in batch]
        _, trained = self.steps.drawn(config.run.seed, progress.iteration)
        # joins the history when the iteration is complete, so that one resumed halfway counts its rewards once
        history = copy.deepcopy(self.statistics)
        # pairs are shuffled and cut as if a prompt that is left out were not there
        left = rewards.isfinite().all(1).repeat_interleave(rewards.shape[1]).nonzero()[:, 0]
        device = self.sampler.policy.device
        surrogate = Surrogate(config.algorithm, rewards, texts, history, device)
        replay = Replay(self.sampler, surrogate, trajectories, conditioning, owner.to(device), self.group)
        parts = [
            (left[rows], steps)
            for epoch in range(config.train.inner_epochs)
            for rows, steps in shuffled_pairs(
                len(left),
                trained,
                config.train.updates_per_iteration,
                config.run.seed,
                progress.iteration,
                epoch,
                self.drawn,
            )
        ]
        for pairs in parts[len(progress.updates) :]:
            try:
                with self._phase("replay"), self._explained():
                    done = self._learn(replay, pairs)
            except _Resized:
                # nothing is learned from these images yet: new ones come from calls of the size they are trained in
                progress.images -= trajectories.count
                progress.trajectories = progress.rewards = None
                self.sample()
                self.update()
                return
            self._tell_of_overflows(done)
            if progress.updates:
                progress.zero_gradient = done.zero_gradient
            progress.updates.append(asdict(done))
            self._check_stop()
        self.statistics = history
        self._account()
        progress.iteration += 1
        progress.pending = {"iteration": progress.iteration, "images": progress.images, **self._summary()}
        progress.metrics, progress.updates, progress.trajectories, progress.rewards = {}, [], None, None

    def _learn(self, replay: Replay, pairs: tuple[Tensor, Tensor]) -> UpdateStatistics:
        """One update, of pairs that are screened first where that pays."""
        screening, padding = None, self._padding()
        if self._screens():
            screening = self.microbatches.fitting(
                self._screening_call(), lambda rows: screen(replay, pairs, microbatch=rows, padding=padding)
            )

        def attempt(rows: int) -> UpdateStatistics:
            if self.microbatches.shared and not self.progress.updates and rows != self.sampler.microbatch:
                raise _Resized
            return update(
                replay,
                self.engine,
                pairs,
                microbatch=rows,
                padding=padding,
                screening=screening,
                before_step=self._check_ratio,
            )

        return self.microbatches.fitting("train", attempt)

    def _tell_of_overflows(self, done: UpdateStatistics) -> None:
        """Says once that updates are repeated, which takes time; the metrics say how often."""
        if not done.overflows or self._overflow_told:
            return
        self._overflow_told = True
        self.display.warning(
            f"iteration {self._iteration}: the gradient overflowed float16, so that an update was repeated "
            f"{done.overflows} time(s), each with half of the loss scale. overflows in metrics.jsonl says how often in "
            "each iteration"
        )

    def _padding(self) -> int | None:
        """To a multiple of how many rows an update's last call is filled up; None: to the microbatch.

        An iteration's first update calls the model as the rollout did, and a compiled model is compiled for one size.
        """
        return PADDING if self.progress.updates and self.config.model.compile == "off" else None

    def _screens(self) -> bool:
        """Whether the next update is screened; not an iteration's first, whose ratio is 1: nothing is clipped."""
        if not self.progress.updates or self.screening == "off":
            return False
        return self.screening == "on" or self.progress.zero_gradient > SCREENING_SHARE

    def _screening_call(self) -> Call:
        """Whose rows a screening call takes: of the sizes that are known to fit on the policy's device the larger."""
        sizes = self.microbatches
        return "rollout" if self.sampler.replica is None and sizes.rollout > sizes.train else "train"

    def record(self) -> None:
        """Evaluates where it is due, writes the iteration's metrics, and saves a checkpoint where it is due."""
        config, progress = self.config, self.progress
        metrics = progress.pending
        assert metrics is not None
        iteration = progress.iteration
        result = None
        if iteration == 0 or self.finished or _due(iteration, config.evaluation.every):
            began = time.perf_counter()
            with self._phase("evaluation"):
                result = self.microbatches.fitting("rollout", self._evaluate)
            metrics |= {
                "eval_reward": result.reward,
                **{f"eval_{name}": value for name, value in result.parts.items()},
            }
            if config.rollout.on_bad_reward == "drop_group":
                metrics["eval_dropped_images"] = result.dropped
            metrics["seconds_eval"] = time.perf_counter() - began
        metrics["seconds"] = time.perf_counter() - self._began
        memory = memory_used(self.sampler.policy.device)
        metrics |= {name: int(self.group.largest(size)) for name, size in memory.items()}
        self.group.on_first(lambda: self._write(result, metrics))
        self.display.advance(metrics)
        progress.pending = None
        if self.finished or _due(iteration, config.checkpoint.every):
            began = time.perf_counter()
            with self._phase("checkpoint"):
                self.save(None if result is None else result.reward)
            # this iteration's line is written: it goes to the next
            self._add({"seconds_checkpoint": time.perf_counter() - began})
        self._check_stop()

    def _evaluate(self, rows: int) -> Evaluation:
        """Measures the policy itself, by the whole schedule: what is measured depends on no lever of the rollout."""
        sampler = self._resized(rows)
        # where the weights are spread over processes, a copy that computes the same bits is the faster way to them
        if not (self.engine.sharded and sampler.replica is not None and sampler.replica.exact):
            sampler = replace(sampler, replica=None)
        self.judge.iteration = self._iteration
        with self.judge.together(), self.engine.averaged():
            result = evaluate(
                sampler,
                self.evaluation_prompts,
                self.judge.score,
                self.config.evaluation,
                between=self._check_stop,
                group=self.group,
            )
        self.judge.account_for(result.dropped, len(result.items))
        return result

    def _write(self, result: Evaluation | None, metrics: dict[str, Any]) -> None:
        """Keeps an iteration's metrics, and its evaluation, if any."""
        assert self._tracker is not None
        if result is not None:
            with writing(self.folder.path):
                grid = result.save(self.folder.path, self.progress.iteration, self.progress.images)
            if grid is not None:
                self._tracker.image("samples", self.progress.iteration, grid)
        self._tracker.record(metrics)

    def finish(self) -> None:
        """Exports the model, writes the report, and says what came out."""
        path = self.folder.path
        exported = path / ("model" if self.config.model.tune == "full" else "lora")
        with self.engine.averaged():
            weights = self.engine.weights()

            def write() -> Path:
                with writing(path):
                    self.sampler.policy.export(exported, weights)
                    return write_report(path)

            report = self.group.on_first(write)
        if not self.group.first:
            return
        lines = read_metrics(path / "metrics.jsonl")
        evaluated = [line for line in lines if "eval_reward" in line]
        deviation = max(line.get("ratio_max_deviation", 0.0) for line in lines)
        base, final = evaluated[0]["eval_reward"], evaluated[-1]["eval_reward"]
        self.display.finish(
            [
                ("base reward", f"{base:.3f}"),
                ("final reward", f"{final:.3f} ({final - base:+.3f})"),
                ("images", f"{self.progress.images}"),
                ("time", f"{evaluated[-1]['seconds']:.0f} s"),
                *([("ratio off by", f"{deviation:.2g} at first")] if deviation else []),
                ("model", str(exported)),
                ("report", str(report)),
            ]
        )

    def close_tracker(self) -> None:
        """Ends the record of metrics."""
        if self._tracker is not None:
            self._tracker.close()

    def close(self) -> None:
        """Ends what runs beside this process, and frees what sampling keeps."""
        self.judge.close()
        self.sampler.release()

    def together(self, error: LoopfastError) -> bool:
        """Whether an error is raised in all processes at once, so that they can still save together."""
        return error.shared or self.group.alone

    def saved(self) -> Path:
        """The checkpoint of the present state, which is written unless it is there."""
        if self._last_saved is not None and self._last_saved[0] == self._position():
            return self._last_saved[1]
        return self.save()

    def _position(self) -> tuple[int, ...]:
        progress = self.progress
        unlearned = progress.trajectories is not None
        return progress.iteration, len(progress.updates), progress.pending is None, unlearned

    def save(self, score: float | None = None) -> Path:
        """Writes a checkpoint of the present state, which is that between two updates."""
        progress = self.progress
        if self.meter.running and progress.trajectories is not None:
            self._account()
        progress.seconds = time.perf_counter() - self._began
        tensors, engine = self.engine.state()
        trajectories = progress.trajectories
        if trajectories is not None and progress.rewards is not None:
            latents = [
                self.group.gather(part, trajectories.rows, trajectories.count)
                for part in (trajectories.latents if not self.group.alone else ())
            ]
            tensors["trajectories"] = {
                "latents": torch.stack([part.cpu() for part in latents]) if latents else trajectories.latents,
                "logprob": trajectories.logprob,
                "rewards": progress.rewards,
            }
        state = {
            "data": self._data_identity(),
            "sampled": self._sampled_identity() if trajectories is not None else {},
            "engine": engine,
            "microbatch": self.microbatches.state_dict(),
            "prompt_statistics": self.statistics.state_dict(),
            "zero_gradient": progress.zero_gradient,
            **{name: getattr(progress, name) for name in _PLAIN},
        }
        path = self.group.on_first(
            lambda: self.folder.checkpoints.save(
                progress.iteration, len(progress.updates), tensors, state, score
            )
        )
        self._last_saved = self._position(), path
        return path

    def _data_identity(self) -> dict[str, str]:
        """What the configuration's prompts and rewards stand for at present."""
        prompts = {"prompts.source": prompts_identity(self.prompts)}
        if self.config.evaluation.prompts is not None:
            prompts["evaluation.prompts"] = prompts_identity(self.evaluation_prompts)
        return prompts | self._identity

    def _sampled_identity(self) -> dict[str, Any]:
        """What the iteration's trajectories are sampled for and scored by at present."""
        schedule, trained = self.steps.drawn(self.config.run.seed, self.progress.iteration)
        shape = self.sampler.policy.latent_shape
        return sampled_identity(self._drawn_prompts(), self._identity, schedule, trained, shape)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, tensors = checkpoint.state, checkpoint.tensors
        try:
            self.engine.load_state(tensors, state["engine"])
            self.statistics.load_state_dict(state["prompt_statistics"])
            self.microbatches.load_state_dict(state.get("microbatch", {}))
            self._resized(self.microbatches.rollout)
            self.progress = Progress(**{name: state[name] for name in _PLAIN})
            self.progress.zero_gradient = state.get("zero_gradient", 0.0)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint {checkpoint.path} cannot be resumed: {error}") from error
        if self._sampled_anew(checkpoint):
            self.progress.metrics, self.progress.updates = {}, []
        else:
            self._restore_trajectories(tensors)

    def _sampled_anew(self, checkpoint: Checkpoint) -> bool:
        """Whether stored trajectories belong to other prompts or rewards than there are now; says what has changed."""

        def compared() -> bool:
            data = changed(checkpoint.state.get("data", {}), self._data_identity())
            stored = checkpoint.state.get("sampled")
            sampled = changed(stored, self._sampled_identity()) if stored else []
            if not (data or sampled):
                return False
            consequence = (
                f"iteration {self.progress.iteration + 1} is sampled anew"
                if sampled
                else "the run goes on with the present ones"
            )
            self.display.warning(
                f"{describe_changes([*sampled, *data])} than when {checkpoint.path.name} was saved; {consequence}"
            )
            return bool(sampled)

        return self.group.on_first(compared)

    def _restore_trajectories(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Takes back what was sampled and not yet learned from, each process its rows."""
        stored = tensors.get("trajectories", {})
        kept = self.group.on_first(
            lambda: (
                (stored["logprob"], stored["rewards"], stored["latents"].shape, stored["latents"].dtype)
                if stored
                else None
            )
        )
        if kept is None:
            return
        logprob, rewards, shape, dtype = kept
        mine, device = self.group.part(shape[1]), self.sampler.policy.device
        latents = torch.stack(
            [
                self.group.broadcast(
                    stored["latents"][step] if stored else torch.empty(shape[1:], dtype=dtype)
                )[mine]
                for step in range(shape[0])
            ]
        )
        trajectories = Trajectories(latents.to(device), logprob.to(device), mine.start)
        on_host = self.config.trajectories.device == "host"
        self.progress.trajectories = trajectories.to_host() if on_host else trajectories
        self.progress.rewards = rewards

    def _batch(self) -> tuple[list[Prompt], Conditioning, Tensor]:
        """The iteration's prompts, their conditioning, and each row's prompt; a function of seed and iteration."""
        iteration = self.progress.iteration
        if self._encoded is None or self._encoded[0] != iteration:
            self._encoded = iteration, self._encode()
        return self._encoded[1]

    def _drawn_prompts(self) -> list[Prompt]:
        wanted, available = self.config.rollout.prompts_per_iteration, len(self.prompts)
        rng = random.Random(derive(self.config.run.seed, "prompts", self.progress.iteration))
        rounds = [
            rng.sample(self.prompts, min(available, wanted - done)) for done in range(0, wanted, available)
        ]
        return [prompt for part in rounds for prompt in part]

    def _encode(self) -> tuple[list[Prompt], Conditioning, Tensor]:
        batch = self._drawn_prompts()
        with self.meter.phase("rollout"), range_("encode", "rollout"):
            conditioning = self.sampler.policy.encode([prompt.text for prompt in batch])
        return (
            batch,
            conditioning,
            torch.arange(len(batch)).repeat_interleave(self.config.algorithm.samples_per_prompt),
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Adds the prompts and the images to an error about a loss that is not finite."""
        try:
            yield
        except NonFiniteError as error:
            trajectories = self.progress.trajectories
            assert trajectories is not None
            batch, _, owner = self._batch()
            rows = error.rows[: self.sampler.microbatch]
            final = self.group.gather(trajectories.final, trajectories.rows, trajectories.count)[list(rows)]
            images = self.sampler.decode(final.to(self.sampler.policy.device))
            texts = [batch[int(owner[row])].text for row in rows]
            self.judge.iteration = self._iteration
            kept = self.group.on_first(lambda: self.judge.keep(list(images), texts))
            raised = NonFiniteError(f"iteration {self._iteration}: {error}; {kept}", error.rows)
            raised.shared = True
            raise raised from error

    @property
    def _iteration(self) -> int:
        """The iteration that is sampled or learned from, or the last one, whose evaluation is due."""
        return self.progress.iteration + (self.progress.pending is None)

    def _check_ratio(self, done: UpdateStatistics) -> None:
        """Before an iteration's first update, the policy is the one that sampled."""
        check, deviation = self.config.train.on_policy_check, done.ratio_max_deviation
        if self.progress.updates or check == "off" or deviation == 0:
            return
        cause = self._cause()
        if cause is not None and deviation <= ON_POLICY_TOLERANCE:
            return
        rounding = cause is None and math.log1p(deviation) <= self._rounding()
        if rounding and self._rounding_told:
            return
        sizes = f"rollout.microbatch and train.microbatch are both {self.microbatches.train}"
        if rounding:
            why = f"equal calls are rounded differently here ({sizes}). The run goes on. {self._remedy()}"
        elif cause is None:
            why = (
                f"rollout and replay disagree, by more than rounding explains, though {sizes}: something in the model "
                "draws random numbers, such as dropout, or differs between calls with and without gradients"
            )
        else:
            why = f"rollout and replay disagree. {cause}"
        message = (
            f"iteration {self.progress.iteration + 1}: before the first update the ratio differs from 1 by up to "
            f"{deviation:.2g}, and for {done.ratio_outside_clip:.1%} of the pairs by more than the clip range; {why}"
        )
        if check == "error" and not rounding:
            error = LoopfastError(message)
            error.shared = True
            raise error
        self._rounding_told |= rounding
        self.display.warning(message)

    def _rounding(self) -> float:
        """How far rounding alone can take the logarithm of this iteration's ratios from 0."""
        config, policy = self.config, self.sampler.policy
        schedule, steps = self.steps.drawn(config.run.seed, self.progress.iteration)
        return rounding_bound(
            schedule,
            steps,
            dtype=policy.dtype,
            shape=policy.latent_shape,
            guidance_scale=config.rollout.guidance_scale,
            mean=config.algorithm.logprob == "mean",
        )

    def _cause(self) -> str | None:
        """The key that has the replay call the model otherwise than the rollout, and what to do about it."""
        config, sizes, replica = self.config, self.microbatches, self.sampler.replica
        if config.rollout.merge_lora:
            return "rollout.merge_lora=true rounds otherwise than the adapter that is trained"
        if replica is not None and not replica.exact:
            key = "dtype" if config.rollout.dtype not in (None, config.model.dtype) else "device"
            given, trained = getattr(config.rollout, key), getattr(config.model, key)
            return f"rollout.{key} ({given}) is not model.{key} ({trained})"
        if sizes.rollout == sizes.train:
            return None
        sizes_given = f"rollout.microbatch ({sizes.rollout}) and train.microbatch ({sizes.train})"
        return f"Give {sizes_given} the same value"

    def _remedy(self) -> str:
        """What makes the difference of equal calls smaller."""
        told = "ratio_max_deviation in metrics.jsonl says by how much in each iteration"
        if self.sampler.policy.device.type == "cuda":
            return f"{told}; model.attention: flash may make it 0"
        if self.sampler.policy.dtype != torch.float32:
            return f"{told}; model.dtype: float32 makes it smaller"
        return f"{told}; it matters only where it comes near the clip range"

    def _check_stop(self) -> None:
        if self.group.any(self._stop.requested):
            raise Stopped

    @contextmanager
    def _phase(self, name: Category) -> Iterator[None]:
        """Shows a part of the iteration, here and to profilers, and enters it in the accounts."""
        self.display.phase(name)
        with self.meter.phase(name):
            yield

    def _account(self) -> None:
        """Adds what the meter counted to the iteration's metrics."""
        self.times = times = self.meter.stop()
        self._add(
            {f"seconds_{name}": seconds for name, seconds in times.phases.items()}
            | {"seconds_iteration": times.total, "seconds_model": times.model}
            | {"model_calls": times.calls.get("denoiser", 0)}
        )

    def _add(self, amounts: dict[str, float]) -> None:
        metrics = self.progress.metrics
        for name, amount in amounts.items():
            metrics[name] = metrics.get(name, 0) + amount

    def _summary(self) -> dict[str, Any]:
        """The iteration's metrics: those of the sampling, and the means over its updates."""
        updates = self.progress.updates
        means = {name: statistics.fmean(update[name] for update in updates) for name in updates[0]}
        if self.config.algorithm.kl_weight == 0:
            del means["kl_reference"]
        # a checkpoint of an earlier version may lack it
        means.pop("overflows", None)
        counts = {}
        if self.config.model.dtype == "float16":
            counts["overflows"] = sum(update.get("overflows", 0) for update in updates)
        metrics = self.progress.metrics
        seconds = metrics["seconds_iteration"]
        images = self.config.rollout.prompts_per_iteration * self.config.algorithm.samples_per_prompt
        return {
            **metrics,
            "images_per_second": images / seconds,
            "model_calls_per_second": metrics["model_calls"] / seconds,
            "outside_model_share": 1 - metrics["seconds_model"] / seconds,
            **means,
            **counts,
            "ratio_max_deviation": updates[0]["ratio_max_deviation"],
            "on_policy_outside_clip": updates[0]["ratio_outside_clip"],
            "learning_rate": updates[-1]["learning_rate"],
        }


_PLAIN = ("iteration", "images", "seconds", "pending", "metrics", "updates")


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration > 0 and iteration % every == 0
