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
    """Returns the initial noise ``[N, *L]`` in the policy's dtype, a function of the rows' seeds alone."""
    # each row has its own key, so that no transition's noise repeats it
    keys = torch.tensor([derive(seed, "initial") for seed in seeds.tolist()], dtype=torch.int64)
    keys = to_device(keys, policy.device)
    noise = philox_normal(keys, torch.zeros_like(keys), (len(keys), *policy.latent_shape))
    return noise.to(policy.dtype)


@dataclass
class DecoderRows:
    """The number of latents to decode at a time, set once memory did not suffice for the policy's own number."""

    limit: int | None = None


@dataclass(frozen=True)
class Sampler:
    """A policy, its transitions, and the settings of the sampling loop.

    Attributes:
        policy: the model that is trained.
        schedule: the T transitions, on the policy's device.
        guidance_scale: the scale of classifier-free guidance; 1 for none.
        reduction: ``sum`` or ``mean``, the reduction of the log-probability over a latent's elements.
        microbatch: rows per model call. They change neither the noise nor, beyond rounding in the model, the result.
        rollout_copy: the copy of the denoiser to sample from. None samples from the policy itself.
        steps: the denoising steps recorded so far.
        decoder_rows: the number of latents to decode at a time. The denoiser's microbatch does not depend on it.
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
        """The policy that is sampled from: the rollout copy's, or the trained one."""
        return self.policy if self.rollout_copy is None else self.rollout_copy.policy

    def allocate(self, count: int) -> Trajectories:
        """Allocates N trajectories, on the policy's device, in the type of the model that is sampled from."""
        steps, model, device = len(self.schedule), self.model, self.policy.device
        return Trajectories(
            torch.empty(steps + 1, count, *model.latent_shape, dtype=model.dtype, device=device),
            torch.empty(steps, count, dtype=torch.float32, device=device),
        )

    def sample(self, conditioning: Conditioning, prompts: Tensor, seeds: Tensor) -> Trajectories:
        """Samples N trajectories.

        Args:
            conditioning: the conditioning of P prompts, rows ``[P, ...]``.
            prompts, seeds: int64 ``[N]`` each, the index of a row's prompt and its noise seed.

        Raises:
            torch.OutOfMemoryError: as `stream` does.
        """
        trajectories = self.allocate(len(seeds))
        for _ in self.stream(trajectories, conditioning, prompts, seeds):
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
        between: Callable[[], None] = lambda: None,
        calls: int = 0,
    ) -> Generator[slice, None, None]:
        """Samples N trajectories, a microbatch at a time. A caller that stops early must close the generator.

        Args:
            trajectories: filled in; `allocate` makes them.
            conditioning, prompts, seeds: as for `sample`.
            between: called before each microbatch; it may raise to stop.
            calls: the least number of microbatches to sample, for other processes that have more rows.

        Yields:
            The rows of each microbatch, once its trajectories are written.

        Raises:
            torch.OutOfMemoryError: the microbatch does not fit into memory; the attempt leaves nothing in memory.
                Libraries under PyTorch raise errors of their own, see `is_out_of_memory`.
        """
        latents, logprob = trajectories.latents, trajectories.logprob
        with self.ready():
            for rows in slices(len(seeds), self.microbatch, calls):
                between()
                size = rows.stop - rows.start
                # without rows of its own, the process samples any row: others may need its part of the weights
                some = rows if size else slice(0, 1)
                done = self._sample_rows(conditioning, prompts[some], seeds[some])
                latents[:, rows], logprob[:, rows] = done.trajectory[:, :size], done.logprob[:, :size]
                if size:
                    yield rows

    def ready(self) -> AbstractContextManager[None]:
        """Context in which samples are those of the policy as it was on entering."""
        return nullcontext() if self.rollout_copy is None else self.rollout_copy.ready()

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents ``[N, *L]`` to images float32 ``[N, 3, H, W]`` in [0, 1].

        One call decodes the number of latents that the policy says, at most a microbatch, and fewer if memory does not
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
            # outside of the handler, where nothing refers to the failed call's tensors
            self._halve_decoder(rows.stop - rows.start, reason)
        # the same layout for any number of parts, as a reward's sums depend on it
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
        """Frees the recorded steps and their buffers, which sampling keeps for its next call."""
        self.steps.release()

    def _sample_rows(self, conditioning: Conditioning, prompts: Tensor, seeds: Tensor) -> DenoisingStep:
        """Samples at most a microbatch; the step's store holds the trajectories in its first rows."""
        model, schedule, size = self.model, self.schedule, self.microbatch
        # all calls have the same batch size; see `pad_rows`
        prompts, seeds = pad_rows(prompts, size), pad_rows(seeds, size)
        try:
            step = self.steps.get(model, size, schedule, conditioning, self.guidance_scale, self.reduction)
            step.step.load(schedule, initial_latents(model, seeds), conditioning, prompts, seeds)
            step.run(len(schedule))
        except Exception as error:
            if is_out_of_memory(error):
                # a new attempt with fewer rows needs their memory
                self.release()
            raise
        return step.step


def slices(count: int, size: int, least: int = 0) -> Iterator[slice]:
    """Yields slices of at most ``size`` that cover ``range(count)`` in order; empty ones fill up to ``least``."""
    for start in range(0, max(count, least * size), size):
        yield slice(min(start, count), min(start + size, count))


def automatic_microbatch(rows: int, latent_shape: tuple[int, ...]) -> int:
    """Returns the rows per model call for ``auto``: 65,536 latent elements, 4 latents of 4×64×64."""
    return max(1, min(rows, 65_536 // math.prod(latent_shape)))
