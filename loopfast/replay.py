"""Replays (row, step) pairs of stored trajectories through the policy, and adds up the gradient of their loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopfast.engines import LocalEngine
from loopfast.policies import Conditioning, expand, pad_rows
from loopfast.profiling import model_call, range_
from loopfast.rollout import Sampler, slices
from loopfast.surrogate import Surrogate
from loopfast.trajectories import Trajectories
from loopfast_kernels import LoopLoss


@dataclass(frozen=True)
class Gradient:
    """Where the gradient of replayed pairs goes.

    Attributes:
        engine: owns the policy's weights.
        count: of the pairs whose mean loss it is of; the sum of the replayed pairs' losses is divided by it.
    """

    engine: LocalEngine
    count: float


@dataclass(frozen=True)
class Replay:
    """An iteration's trajectories, with all that a model call on a pair of them takes.

    Attributes:
        sampler: the policy and its transitions.
        surrogate: the loss.
        trajectories: what was sampled, N rows.
        conditioning: of the iteration's prompts.
        prompts: int64 ``[N]``, each row's prompt; on the policy's device.
    """

    sampler: Sampler
    surrogate: Surrogate
    trajectories: Trajectories
    conditioning: Conditioning
    prompts: Tensor

    def losses(
        self,
        pairs: tuple[Tensor, Tensor],
        microbatch: int,
        gradient: Gradient | None = None,
        *,
        padding: int | None = None,
    ) -> list[LoopLoss]:
        """The losses of the pairs' microbatches, detached, in the order of the pairs.

        Without a gradient none is computed, and the policy before training is not asked.

        Args:
            pairs: ``(rows [M], steps [M])``.
            microbatch: pairs per model call.
            gradient: where it goes.
            padding: the last call's rows are filled up to a multiple of this; None: to the microbatch, see `pad_rows`.

        Raises:
            torch.OutOfMemoryError: the microbatch does not fit.
        """
        device = self.trajectories.logprob.device
        # indices of the stored latents, which may be on the host: moved once, not in every microbatch
        stored = [index.to(self.trajectories.latents.device) for index in pairs]
        rows, steps = (index.to(device) for index in pairs)
        losses = []
        with torch.set_grad_enabled(gradient is not None):
            for part in slices(len(rows), microbatch):
                with range_("pairs", "replay", part.start):
                    transitions = self.trajectories.pairs(stored[0][part], stored[1][part])
                count = part.stop - part.start
                padded = microbatch if padding is None else min(count + -count % padding, microbatch)
                loss = self._loss(rows[part], steps[part], transitions, padded, part.start, gradient)
                losses.append(LoopLoss(*(value.detach() for value in loss)))
        return losses

    def _loss(
        self,
        rows: Tensor,
        steps: Tensor,
        transitions: tuple[Tensor, Tensor, Tensor],
        padded: int,
        start: int,
        gradient: Gradient | None,
    ) -> LoopLoss:
        """Of one model call of as many rows as `padded` says, whose pairs begin at `start`."""
        policy, size, device = self.sampler.policy, len(rows), rows.device
        with range_("pairs", "replay", start):
            row, step = pad_rows(rows, padded), pad_rows(steps, padded)
            # stored in the type of the model that was sampled from
            sample = pad_rows(transitions[0], padded).to(policy.dtype)
            text = expand(self.conditioning, self.prompts[row])
            timestep = self.sampler.schedule.timesteps[step]
        reference = None
        if gradient is not None and self.surrogate.needs_reference:
            reference = reference_output(self.sampler, sample, timestep, text)[:size]
        with model_call("denoiser", "replay", start, device):
            output, unconditional = policy.predict(sample, timestep, text, self.sampler.guidance_scale)
        with range_("loss", "replay", start):
            unconditional = None if unconditional is None else unconditional[:size]
            loss = self.surrogate(
                self.sampler, output[:size], unconditional, reference, transitions, rows, steps
            )
        if gradient is not None:
            # the loss has its gradients already: of the backward pass, the denoiser's is all but about 0.1 ms
            with model_call("backward", "replay", start, device):
                gradient.engine.backward(loss.loss * (size / gradient.count))
        return loss


@torch.no_grad()
def reference_output(sampler: Sampler, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
    """The guided output of the policy before training, ``[M, *L]``."""
    with sampler.policy.reference(), model_call("denoiser", "replay", device=sample.device):
        output, unconditional = sampler.policy.predict(sample, timestep, text, sampler.guidance_scale)
    return output if unconditional is None else torch.lerp(unconditional, output, sampler.guidance_scale)


def rehearse(
    sampler: Sampler,
    engine: LocalEngine,
    conditioning: Conditioning,
    *,
    microbatch: int,
    with_reference: bool,
) -> None:
    """The model call of an update, forward and backward, on zeros: whether memory suffices, and nothing else.

    Args:
        sampler: the policy and its transitions.
        engine: owns the policy's weights, which stay as they are.
        conditioning: of one prompt or more.
        microbatch: pairs in the call.
        with_reference: whether the policy before training is asked as well.

    Raises:
        torch.OutOfMemoryError: it does not.
    """
    policy = sampler.policy
    rows = torch.zeros(microbatch, dtype=torch.int64, device=policy.device)
    sample = torch.zeros(microbatch, *policy.latent_shape, dtype=policy.dtype, device=policy.device)
    text, timestep = expand(conditioning, rows), sampler.schedule.timesteps[rows]
    try:
        reference = reference_output(sampler, sample, timestep, text) if with_reference else None
        outputs = policy.predict(sample, timestep, text, sampler.guidance_scale)
        engine.backward(torch.stack([o.float().mean() for o in outputs if o is not None]).sum())
        del reference, outputs
    finally:
        engine.discard()
