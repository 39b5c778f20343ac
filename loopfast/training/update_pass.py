"""Evaluates the loss of (row, step) pairs of stored trajectories, and accumulates its gradient.

This is the phase that profiles and metrics call replay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopfast.distributed.pair_shards import Microbatch, PairShard
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.engines import Engine
from loopfast.policies import Conditioning, expand, pad_rows
from loopfast.profiling import model_call, range_
from loopfast.rollout import Sampler, slices
from loopfast.rollout.trajectories import Trajectories
from loopfast.training.loss import PolicyLoss
from loopfast_kernels import LoopLoss


@dataclass(frozen=True)
class Losses:
    """The losses of M pairs, in the order of the pairs; the same on every rank.

    Attributes:
        loss: the mean loss.
        logprob, ratio, kl: float32 ``[M]``, as in `LoopLoss`.
        clipped: bool ``[M]``, as in `LoopLoss`.
        zero_gradient: bool ``[M]``, the pairs whose loss has no gradient.
    """

    loss: float
    logprob: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor
    zero_gradient: Tensor


@dataclass(frozen=True)
class UpdatePass:
    """An iteration's trajectories, with everything that a model call on their pairs needs.

    Attributes:
        sampler: the policy and its transitions.
        loss: the loss of a pair.
        trajectories: the sampled trajectories, N rows.
        conditioning: the conditioning of the iteration's prompts.
        prompt_index: int64 ``[N]``, each row's prompt, on the policy's device.
        world: the processes. All ranks are given the same pairs, and each one evaluates its shard.
    """

    sampler: Sampler
    loss: PolicyLoss
    trajectories: Trajectories
    conditioning: Conditioning
    prompt_index: Tensor
    world: World = field(default=SINGLE_PROCESS)

    def losses(
        self,
        pairs: tuple[Tensor, Tensor],
        microbatch: int,
        engine: Engine | None = None,
        count: float = 1,
        *,
        padding: int | None = None,
    ) -> Losses:
        """Returns the losses of pairs, and gives their gradient to an engine.

        Args:
            pairs: ``(rows [M], steps [M])``.
            microbatch: the number of pairs per model call.
            engine: receives the gradient of the sum of the losses, divided by ``count``. With None no gradient is
                computed and the reference policy is not called, so that the loss must have no KL penalty.
            count: see ``engine``.
            padding: the last call is padded to a multiple of this number of rows. None pads it to the microbatch,
                see `pad_rows`.

        Raises:
            torch.OutOfMemoryError: the microbatch does not fit.
        """
        with range_("pairs", "replay"):
            shard = PairShard(self.world, self.trajectories, pairs)
        # All ranks make the same number of calls, as each may hold a part of the weights and gradients.
        calls = list(slices(len(shard.positions), microbatch, -(-shard.most // microbatch)))
        losses = []
        with torch.set_grad_enabled(engine is not None):
            for call in calls:
                with range_("pairs", "replay", call.start):
                    batch = shard.microbatch(call)
                size = len(batch.rows)
                padded = microbatch if padding is None else min(size + -size % padding, microbatch)
                loss = self._loss(batch, padded, call.start, engine is not None)
                if engine is not None:
                    # The loss already has its gradients: all but about 0.1 ms of this is the denoiser's.
                    with model_call("backward", "replay", call.start, batch.rows.device):
                        engine.backward(loss.loss * (batch.count / count), last=call is calls[-1])
                if batch.count:
                    losses.append(LoopLoss(*(value.detach() for value in loss)))
        return self._gathered(losses, shard.positions, len(pairs[0]))

    def _loss(self, batch: Microbatch, padded: int, start: int, with_reference: bool) -> LoopLoss:
        """Returns the loss of one model call, which has ``padded`` rows and whose pairs begin at ``start``."""
        policy, size, device = self.sampler.policy, len(batch.rows), batch.rows.device
        with range_("pairs", "replay", start):
            row, step = pad_rows(batch.rows, padded), pad_rows(batch.steps, padded)
            # The latents are stored in the dtype of the model that sampled them.
            sample = pad_rows(batch.transitions[0], padded).to(policy.dtype)
            text = expand(self.conditioning, self.prompt_index[row])
            timestep = self.sampler.schedule.timesteps[step]
        reference = None
        if with_reference and self.loss.needs_reference:
            reference = reference_output(self.sampler, sample, timestep, text)[:size]
        with model_call("denoiser", "replay", start, device):
            output, unconditional = policy.predict(sample, timestep, text, self.sampler.guidance_scale)
        with range_("loss", "replay", start):
            unconditional = None if unconditional is None else unconditional[:size]
            return self.loss(
                self.sampler,
                output[:size],
                unconditional,
                reference,
                batch.transitions,
                batch.rows,
                batch.steps,
            )

    def _gathered(self, losses: list[LoopLoss], positions: Tensor, count: int) -> Losses:
        """Gathers the losses of all ranks, in the order of the pairs."""
        home = self.trajectories.logprob
        sizes = torch.tensor([len(loss.ratio) for loss in losses], dtype=torch.float64)
        means = torch.zeros(0, dtype=torch.float64)
        numbers, flags = home.new_empty(0, 3), torch.empty(0, 2, dtype=torch.bool, device=home.device)
        if losses:
            means = torch.stack([loss.loss for loss in losses]).double().cpu()
            numbers = torch.cat([torch.stack([loss.logprob, loss.ratio, loss.kl], 1) for loss in losses])
            flags = torch.cat(
                [torch.stack([loss.clipped, self.loss.zero_gradient(loss)], 1) for loss in losses]
            )
        total = self.world.sum((means * sizes).sum())
        numbers = self.world.gather(numbers, positions, count)
        flags = self.world.gather(flags, positions, count)
        return Losses(float(total) / count, *numbers.unbind(1), *flags.unbind(1))


@torch.no_grad()
def reference_output(sampler: Sampler, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
    """Returns the guided output of the policy before training, ``[M, *L]``."""
    with sampler.policy.reference(), model_call("denoiser", "replay", device=sample.device):
        output, unconditional = sampler.policy.predict(sample, timestep, text, sampler.guidance_scale)
    return output if unconditional is None else torch.lerp(unconditional, output, sampler.guidance_scale)
