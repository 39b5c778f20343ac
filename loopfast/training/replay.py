"""Replays (row, step) pairs of stored trajectories through the policy, and adds up the gradient of their loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopfast.distributed.group import ALONE, Group
from loopfast.distributed.pair_shards import Part, Share
from loopfast.engines import Engine
from loopfast.policies import Conditioning, expand, pad_rows
from loopfast.profiling import model_call, range_
from loopfast.rollout import Sampler, slices
from loopfast.rollout.trajectories import Trajectories
from loopfast.training.loss import PolicyLoss
from loopfast_kernels import LoopLoss


@dataclass(frozen=True)
class Gradient:
    """Where the gradient of replayed pairs goes.

    Attributes:
        engine: owns the policy's weights.
        count: of the pairs whose mean loss it is of; the sum of the replayed pairs' losses is divided by it.
    """

    engine: Engine
    count: float


@dataclass(frozen=True)
class Losses:
    """What was found about M pairs, in their order; the same in every process.

    Attributes:
        loss: their mean loss.
        logprob, ratio, kl: float32 ``[M]``, as in `LoopLoss`.
        clipped: bool ``[M]``, as there.
        zero_gradient: bool ``[M]``, the pairs whose loss has no gradient.
    """

    loss: float
    logprob: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor
    zero_gradient: Tensor


@dataclass(frozen=True)
class Replay:
    """An iteration's trajectories, with all that a model call on a pair of them takes.

    Attributes:
        sampler: the policy and its transitions.
        loss: of the pairs.
        trajectories: what was sampled, N rows.
        conditioning: of the iteration's prompts.
        prompts: int64 ``[N]``, each row's prompt; on the policy's device.
        group: the processes that replay together; every one is given the same pairs and replays its share.
    """

    sampler: Sampler
    loss: PolicyLoss
    trajectories: Trajectories
    conditioning: Conditioning
    prompts: Tensor
    group: Group = field(default=ALONE)

    def losses(
        self,
        pairs: tuple[Tensor, Tensor],
        microbatch: int,
        gradient: Gradient | None = None,
        *,
        padding: int | None = None,
    ) -> Losses:
        """The losses of pairs, in their order.

        Without a gradient none is computed, and the policy before training is not asked.

        Args:
            pairs: ``(rows [M], steps [M])``.
            microbatch: pairs per model call.
            gradient: where it goes.
            padding: the last call's rows are filled up to a multiple of this; None: to the microbatch, see `pad_rows`.

        Raises:
            torch.OutOfMemoryError: the microbatch does not fit.
        """
        with range_("pairs", "replay"):
            share = Share(self.group, self.trajectories, pairs)
        # every process makes as many calls: weights and gradients may lie in parts with all of them
        calls = list(slices(len(share.positions), microbatch, -(-share.most // microbatch)))
        losses = []
        with torch.set_grad_enabled(gradient is not None):
            for call in calls:
                with range_("pairs", "replay", call.start):
                    part = share.part(call)
                count = len(part.rows)
                padded = microbatch if padding is None else min(count + -count % padding, microbatch)
                loss = self._loss(part, padded, call.start, gradient, last=call is calls[-1])
                if part.count:
                    losses.append(LoopLoss(*(value.detach() for value in loss)))
        return self._together(losses, share.positions, len(pairs[0]))

    def _loss(
        self, part: Part, padded: int, start: int, gradient: Gradient | None, *, last: bool
    ) -> LoopLoss:
        """Of one model call of as many rows as `padded` says, whose pairs begin at `start`."""
        policy, size, device = self.sampler.policy, len(part.rows), part.rows.device
        with range_("pairs", "replay", start):
            row, step = pad_rows(part.rows, padded), pad_rows(part.steps, padded)
            # stored in the type of the model that was sampled from
            sample = pad_rows(part.transitions[0], padded).to(policy.dtype)
            text = expand(self.conditioning, self.prompts[row])
            timestep = self.sampler.schedule.timesteps[step]
        reference = None
        if gradient is not None and self.loss.needs_reference:
            reference = reference_output(self.sampler, sample, timestep, text)[:size]
        with model_call("denoiser", "replay", start, device):
            output, unconditional = policy.predict(sample, timestep, text, self.sampler.guidance_scale)
        with range_("loss", "replay", start):
            unconditional = None if unconditional is None else unconditional[:size]
            loss = self.loss(
                self.sampler,
                output[:size],
                unconditional,
                reference,
                part.transitions,
                part.rows,
                part.steps,
            )
        if gradient is not None:
            # the loss has its gradients already: of the backward pass, the denoiser's is all but about 0.1 ms
            with model_call("backward", "replay", start, device):
                gradient.engine.backward(loss.loss * (part.count / gradient.count), last=last)
        return loss

    def _together(self, losses: list[LoopLoss], positions: Tensor, count: int) -> Losses:
        """What all processes found, in the order of the pairs."""
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
        total = self.group.sum((means * sizes).sum())
        numbers = self.group.gather(numbers, positions, count)
        flags = self.group.gather(flags, positions, count)
        return Losses(float(total) / count, *numbers.unbind(1), *flags.unbind(1))


@torch.no_grad()
def reference_output(sampler: Sampler, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
    """The guided output of the policy before training, ``[M, *L]``."""
    with sampler.policy.reference(), model_call("denoiser", "replay", device=sample.device):
        output, unconditional = sampler.policy.predict(sample, timestep, text, sampler.guidance_scale)
    return output if unconditional is None else torch.lerp(unconditional, output, sampler.guidance_scale)
