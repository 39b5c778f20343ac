"""The sampling loop over the transition table."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopfast.errors import LoopfastError
from loopfast.policies import Conditioning, Policy, pad_rows
from loopfast.profiling import model_call
from loopfast.rollout.capture import StepCache
from loopfast.rollout.rollout_copy import RolloutCopy
from loopfast.rollout.step import DenoisingStep
from loopfast.rollout.trajectories import Trajectories
from loopfast.schedules import TransitionSchedule
from loopfast.seeds import derive
from loopfast.system.memory import first_sentence, free_cached_memory, is_out_of_memory, to_device
from loopfast_kernels import philox_normal


def initial_latents(policy: Policy, seeds: Tensor) -> Tensor:
    """The noise that sampling starts from: ``[N, *L]`` in the policy's dtype, a function of the rows' seeds alone."""
    # a key of its own for each row, so that no transition's noise repeats it
    keys = torch.tensor([derive(seed, "initial") for seed in seeds.tolist()], dtype=torch.int64)
    keys = to_device(keys, policy.device)
    noise = philox_normal(keys, torch.zeros_like(keys), (len(keys), *policy.latent_shape))
    return noise.to(policy.dtype)


@dataclass
class DecoderRows:
    """How many latents are decoded at a time, once memory did not suffice for as many as the policy says."""

    limit: int | None = None


@dataclass(frozen=True)
class Sampler:
    """A policy, the transitions it is sampled by, and how.

    Attributes:
        policy: the model that is trained.
        schedule: its T transitions, on the policy's device.
        guidance_scale: of classifier-free guidance; 1 for none.
        reduction: ``sum`` or ``mean``, of the log-probability over a latent's elements.
        microbatch: rows per model call. It changes neither the noise nor, beyond rounding in the model, the result.
        rollout_copy: the copy of the policy to sample from; None: the policy itself.
        steps: the denoising steps recorded so far.
        decoder_rows: how many latents are decoded at a time. The denoiser's microbatch does not depend on it.
    """

    policy: Policy
    schedule: TransitionSchedule
    guidance_scale: float
    reduction: str
    microbatch: int
    rollout_copy: RolloutCopy | None = None
    steps: StepCache = field(default_factory=StepCache)
    decoder_rows: DecoderRows = field(default_factory=DecoderRows)

    @property
    def model(self) -> Policy:
        """What is sampled from: the replica's policy, or the policy itself."""
        return self.policy if self.rollout_copy is None else self.rollout_copy.policy

    def allocate(self, count: int, schedule: TransitionSchedule | None = None) -> Trajectories:
        """Room for N trajectories, on the policy's device, in the type of the model that is sampled from.

        Args:
            count: N.
            schedule: the T transitions to sample by; None: the sampler's own.
        """
        steps, model, device = len(schedule or self.schedule), self.model, self.policy.device
        return Trajectories(
            torch.empty(steps + 1, count, *model.latent_shape, dtype=model.dtype, device=device),
            torch.empty(steps, count, dtype=torch.float32, device=device),
        )

    def sample(
        self,
        conditioning: Conditioning,
        prompts: Tensor,
        seeds: Tensor,
        *,
        schedule: TransitionSchedule | None = None,
    ) -> Trajectories:
        """Samples N trajectories.

        Args:
            conditioning: of the P prompts, rows ``[P, ...]``.
            prompts: int64 ``[N]``, each row's prompt.
            seeds: int64 ``[N]``, each row's noise seed.
            schedule: the T transitions to sample by; None: the sampler's own.

        Raises:
            torch.OutOfMemoryError: as `stream`.
        """
        trajectories = self.allocate(len(seeds), schedule)
        for _ in self.stream(trajectories, conditioning, prompts, seeds, schedule=schedule):
            pass
        return trajectories

    @torch.no_grad()
    def stream(
        self,
        trajectories: Trajectories,
        conditioning: Conditioning,
        prompts: Tensor,
        seeds: Tensor,
        *,
        schedule: TransitionSchedule | None = None,
        between: Callable[[], None] = lambda: None,
        calls: int = 0,
    ) -> Generator[slice, None, None]:
        """Samples N trajectories, a microbatch at a time; close it where it is not run to its end.

        Args:
            trajectories: room for them, see `allocate`.
            conditioning: of the P prompts, rows ``[P, ...]``.
            prompts: int64 ``[N]``, each row's prompt.
            seeds: int64 ``[N]``, each row's noise seed.
            schedule: the T transitions to sample by; None: the sampler's own.
            between: called before each microbatch; it may raise to stop.
            calls: sample at least so many microbatches, as other processes do that have more rows.

        Yields:
            The rows of each microbatch, whose trajectories are there.

        Raises:
            torch.OutOfMemoryError: the microbatch does not fit into memory; nothing is kept of the attempt. Libraries
                under PyTorch raise errors of their own, see `is_out_of_memory`.
        """
        schedule, model = schedule or self.schedule, self.model
        latents, logprob = trajectories.latents, trajectories.logprob
        with self.ready():
            for rows in slices(len(seeds), self.microbatch, calls):
                between()
                size = rows.stop - rows.start
                # without rows of its own, a call of any: others may need this process's part of the weights
                some = rows if size else slice(0, 1)
                done = self._sample_rows(model, schedule, conditioning, prompts[some], seeds[some])
                latents[:, rows], logprob[:, rows] = done.trajectory[:, :size], done.logprob[:, :size]
                if size:
                    yield rows

    def ready(self) -> AbstractContextManager[None]:
        """Inside, samples are those of the policy as it was on entering, and the replica is refreshed no more."""
        return nullcontext() if self.rollout_copy is None else self.rollout_copy.ready()

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 ``[N, 3, H, W]`` in [0, 1] of latents ``[N, *L]``.

        They are decoded as many at a time as the policy says, at most a microbatch, and fewer where memory does not
        suffice.

        Raises:
            LoopfastError: memory does not suffice for one image.
        """
        images: list[Tensor] = []
        start = 0
        while start < len(latents):
            most = self.decoder_rows.limit or self.policy.decoder_rows
            rows = slice(start, min(start + most, start + self.microbatch, len(latents)))
            try:
                with model_call("decoder", "reward", start, latents.device):
                    images.append(self.policy.decode(latents[rows]))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_sentence(error)
            else:
                start = rows.stop
                continue
            # outside of the handler, where nothing holds the failed call's tensors any more
            self._halve_decoder(rows.stop - rows.start, reason)
        # of one layout however many parts there were, as a reward's sums depend on it
        return torch.cat(images).contiguous()

    def _halve_decoder(self, rows: int, reason: str) -> None:
        if rows == 1:
            raise LoopfastError(
                "not even one image can be decoded in the memory that is left beside the denoiser; a smaller "
                f"rollout.microbatch, model.vae_tiling=true and model.free_text_encoder=true need less ({reason})"
            )
        self.decoder_rows.limit = rows // 2
        free_cached_memory()

    def release(self) -> None:
        """Frees what sampling keeps for the next time: recorded steps and their buffers."""
        self.steps.release()

    def _sample_rows(
        self,
        model: Policy,
        schedule: TransitionSchedule,
        conditioning: Conditioning,
        prompts: Tensor,
        seeds: Tensor,
    ) -> DenoisingStep:
        """Samples at most a microbatch; the step's store holds the trajectories in its first rows."""
        size = self.microbatch
        # every call has the same batch size; see `pad_rows`
        prompts, seeds = pad_rows(prompts, size), pad_rows(seeds, size)
        try:
            step = self.steps.get(model, size, schedule, conditioning, self.guidance_scale, self.reduction)
            step.step.load(schedule, initial_latents(model, seeds), conditioning, prompts, seeds)
            step.run(len(schedule))
        except Exception as error:
            if is_out_of_memory(error):
                # who tries again with fewer rows needs the room of these
                self.release()
            raise
        return step.step


def slices(count: int, size: int, least: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(count)``, then empty ones until there are ``least``."""
    for start in range(0, max(count, least * size), size):
        yield slice(min(start, count), min(start + size, count))


def automatic_microbatch(rows: int, latent_shape: tuple[int, ...]) -> int:
    """Rows per model call where the configuration says ``auto``: 65,536 latent elements, 4 latents of 4×64×64."""
    return max(1, min(rows, 65_536 // math.prod(latent_shape)))
