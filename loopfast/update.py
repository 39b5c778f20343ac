"""One policy update: replays (row, step) pairs of stored trajectories through the policy and steps the optimizer.

A pair whose ratio is outside the clip range on the side that its advantage pushes to, or whose advantage is 0, has a
loss without a gradient. `screen` finds these with forward calls alone, and `update` then replays only the others. With
a forward call as the unit of cost and a backward pass twice as dear, a pair costs ``1 + 3 (1 - c)`` instead of 3,
``c`` being the share without a gradient: less where c > 1/3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loopfast.algorithms import ALGORITHMS, PromptStatistics, advantages
from loopfast.config import AlgorithmConfig
from loopfast.engines import LocalEngine
from loopfast.errors import NonFiniteError
from loopfast.policies import Conditioning, expand, pad_rows
from loopfast.profiling import model_call, phase, range_
from loopfast.rollout import Sampler, slices
from loopfast.trajectories import Trajectories
from loopfast_kernels import LoopLoss, clipped_loss, loop_loss


@dataclass(frozen=True)
class UpdateStatistics:
    """Means over an update's pairs, except ``ratio_max_deviation`` (a maximum) and what the engine adds.

    ``zero_gradient`` is the share of pairs whose loss has no gradient, ``screened_out`` the share of those that
    had no backward pass.
    """

    loss: float
    kl: float
    kl_reference: float
    clip_fraction: float
    ratio_outside_clip: float
    ratio_max_deviation: float
    logprob_change: float
    zero_gradient: float
    screened_out: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0


@dataclass(frozen=True)
class Screening:
    """What a pass without gradients finds out about an update's M pairs.

    Attributes:
        statistics: of all of them.
        kept: bool ``[M]`` on the CPU, the pairs whose loss has a gradient.
    """

    statistics: UpdateStatistics
    kept: Tensor


class Surrogate:
    """The loss of one iteration's pairs, by an algorithm's row of the table.

    Leave-one-out algorithms hand the rewards to the kernel, which works out the advantage itself; the others hand it
    their advantages.

    Args:
        config: the section ``algorithm``.
        rewards: float32 ``[G, K]``.
        prompts: the G prompts.
        statistics: the prompts' history; updated by algorithms that keep one.
        device: where the latents are.
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        rewards: Tensor,
        prompts: list[str],
        statistics: PromptStatistics,
        device: torch.device,
    ) -> None:
        row = ALGORITHMS[config.name]
        self.clip_range = row.clip_range if config.clip_range is None else config.clip_range
        self._config = config
        difference, scale = advantages(
            row, rewards, prompts, statistics, normalize=config.advantage.normalize
        )
        self._fused = row.baseline == "leave_one_out" and scale.dim() == 0
        self._rewards = rewards.to(device)
        self._scale = scale.to(device)
        advantage = difference * scale
        if config.advantage.clip is not None:
            advantage = advantage.clamp(-config.advantage.clip, config.advantage.clip)
        self._advantage = advantage.flatten().to(device)

    def __call__(
        self,
        sampler: Sampler,
        output: Tensor,
        unconditional: Tensor | None,
        reference: Tensor | None,
        transitions: tuple[Tensor, Tensor, Tensor],
        rows: Tensor,
        steps: Tensor,
    ) -> LoopLoss:
        """The loss of M pairs from the policy's and the reference's outputs for them.

        Args:
            sampler: whose transitions they are.
            output, unconditional, reference: ``[M, *L]`` each.
            transitions: ``(sample, prev_sample, old_logprob)`` of the pairs, see `Trajectories.pairs`.
            rows, steps: int64 ``[M]``, the pairs.
        """
        sample, prev_sample, old_logprob = transitions
        if self._fused:
            op = partial(
                loop_loss,
                rewards=self._rewards,
                trajectory=rows,
                advantage_scale=self._scale,
                advantage_clip=self._config.advantage.clip,
            )
        else:
            op = partial(clipped_loss, advantage=self._advantage[rows])
        return op(
            output,
            sample,
            prev_sample,
            sampler.schedule.table,
            steps,
            old_logprob,
            clip_range=self.clip_range,
            uncond_output=unconditional,
            guidance_scale=sampler.guidance_scale,
            reference_output=reference,
            kl_weight=self._config.kl_weight,
            reduction=sampler.reduction,
        )

    def zero_gradient(self, loss: LoopLoss) -> Tensor:
        """Bool ``[M]``: which of the pairs' losses have no gradient; none where each has that of its KL divergence."""
        if self._config.kl_weight > 0:
            return torch.zeros_like(loss.clipped)
        return loss.clipped | (loss.advantage == 0)


def screen(
    sampler: Sampler,
    surrogate: Surrogate,
    trajectories: Trajectories,
    conditioning: Conditioning,
    prompts: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    microbatch: int,
) -> Screening:
    """Finds the pairs that an update's gradient consists of, by forward calls without gradients.

    Not for a loss with a KL penalty, of which every pair has a gradient.

    Args:
        sampler, surrogate, trajectories, conditioning, prompts, pairs: as for `update`.
        microbatch: pairs per model call; may be larger than that of the update, as no activation is kept.

    Raises:
        NonFiniteError: a loss is NaN or infinite. ``rows`` of the error holds the trajectories at fault.
        torch.OutOfMemoryError: the microbatch does not fit.
    """
    with torch.no_grad():
        losses = _replay(
            sampler,
            surrogate,
            trajectories,
            conditioning,
            prompts,
            pairs,
            microbatch=microbatch,
            with_reference=False,
        )
    statistics = _statistics(losses, surrogate, trajectories, pairs)
    zero = torch.cat([surrogate.zero_gradient(loss) for loss in losses])
    return Screening(statistics, ~zero.cpu())


def update(
    sampler: Sampler,
    engine: LocalEngine,
    surrogate: Surrogate,
    trajectories: Trajectories,
    conditioning: Conditioning,
    prompts: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    microbatch: int,
    with_reference: bool,
    screening: Screening | None = None,
    before_step: Callable[[UpdateStatistics], None] = lambda statistics: None,
) -> UpdateStatistics:
    """One optimizer step on the mean loss of M pairs.

    Args:
        sampler: the policy and its transitions.
        engine: owns the policy's weights.
        surrogate: the loss.
        trajectories: what was sampled.
        conditioning: of the iteration's prompts.
        prompts: int64 ``[N]``, each row's prompt.
        pairs: ``(rows [M], steps [M])``, which transitions to train on.
        microbatch: pairs per model call; it changes the result by no more than the rounding of a sum.
        with_reference: also compare with the policy before training.
        screening: of these pairs, under the present weights; those without a gradient are left out. The gradient is
            the same up to the rounding of a sum, and the statistics are the screening's.
        before_step: called with the statistics before the weights change; it may raise to keep them.

    Raises:
        NonFiniteError: a loss or the gradient is NaN or infinite; the weights are as they were. ``rows`` of the error
            holds the trajectories at fault.
        torch.OutOfMemoryError: the microbatch does not fit; weights and engine are as they were, so that the update
            can be tried again with a smaller one.
    """
    try:
        statistics = _accumulate(
            sampler,
            engine,
            surrogate,
            trajectories,
            conditioning,
            prompts,
            pairs,
            microbatch=microbatch,
            with_reference=with_reference,
            screening=screening,
        )
        before_step(statistics)
        learning_rate = engine.learning_rate
        with phase("optimizer"):
            norm = engine.update()
    except NonFiniteError as error:
        engine.discard()
        raise NonFiniteError(str(error), error.rows or pairs[0].unique().tolist()) from error
    except BaseException:
        engine.discard()
        raise
    return replace(statistics, grad_norm=norm, learning_rate=learning_rate)


def rehearse(
    sampler: Sampler,
    engine: LocalEngine,
    conditioning: Conditioning,
    *,
    microbatch: int,
    with_reference: bool,
) -> None:
    """The model call of an update, forward and backward, on zeros: whether memory suffices, and nothing else.

    Raises:
        torch.OutOfMemoryError: it does not.
    """
    policy = sampler.policy
    rows = torch.zeros(microbatch, dtype=torch.int64, device=policy.device)
    sample = torch.zeros(microbatch, *policy.latent_shape, dtype=policy.dtype, device=policy.device)
    text, timestep = expand(conditioning, rows), sampler.schedule.timesteps[rows]
    try:
        reference = _reference(sampler, sample, timestep, text, microbatch) if with_reference else None
        outputs = policy.predict(sample, timestep, text, sampler.guidance_scale)
        engine.backward(torch.stack([o.float().mean() for o in outputs if o is not None]).sum())
        del reference, outputs
    finally:
        engine.discard()


def _accumulate(
    sampler: Sampler,
    engine: LocalEngine,
    surrogate: Surrogate,
    trajectories: Trajectories,
    conditioning: Conditioning,
    prompts: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    microbatch: int,
    with_reference: bool,
    screening: Screening | None,
) -> UpdateStatistics:
    """Adds up the gradient of the pairs' mean loss; raises as `update` does."""
    trained, count = pairs, float(len(pairs[0]))
    if screening is not None:
        rows, steps = (index.cpu() for index in pairs)
        trained = rows[screening.kept], steps[screening.kept]
        if not screening.kept.any():
            # the optimizer still steps, with gradients that are there and 0, for which any pair will do
            trained, count = (rows[:1], steps[:1]), math.inf
    losses = _replay(
        sampler,
        surrogate,
        trajectories,
        conditioning,
        prompts,
        trained,
        microbatch=microbatch,
        with_reference=with_reference,
        engine=engine,
        count=count,
    )
    statistics = _statistics(losses, surrogate, trajectories, trained)
    if screening is None:
        return statistics
    return replace(screening.statistics, screened_out=float((~screening.kept).double().mean()))


def _replay(
    sampler: Sampler,
    surrogate: Surrogate,
    trajectories: Trajectories,
    conditioning: Conditioning,
    prompts: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    microbatch: int,
    with_reference: bool,
    engine: LocalEngine | None = None,
    count: float = math.inf,
) -> list[LoopLoss]:
    """The losses of an update's microbatches, detached, in the order of its pairs.

    Args:
        engine: is given the gradient of the pairs' losses, if any is wanted.
        count: by how much the sum of these losses is divided there.
    """
    device = trajectories.logprob.device
    here = [index.to(trajectories.latents.device) for index in pairs]
    rows, steps = (index.to(device) for index in pairs)
    prompts = prompts.to(device)
    losses = []
    for part in slices(len(rows), microbatch):
        size = part.stop - part.start
        with range_("pairs", "replay", part.start):
            # every call has the batch size of the rollout's; see `pad_rows`
            row, step = pad_rows(rows[part], microbatch), pad_rows(steps[part], microbatch)
            transitions = trajectories.pairs(here[0][part], here[1][part])
            # stored in the type of the model that was sampled from
            sample = pad_rows(transitions[0], microbatch).to(sampler.policy.dtype)
            text = expand(conditioning, prompts[row])
            timestep = sampler.schedule.timesteps[step]
        reference = _reference(sampler, sample, timestep, text, size) if with_reference else None
        with model_call("denoiser", "replay", part.start, device):
            output, unconditional = sampler.policy.predict(sample, timestep, text, sampler.guidance_scale)
        with range_("loss", "replay", part.start):
            unconditional = None if unconditional is None else unconditional[:size]
            result = surrogate(
                sampler, output[:size], unconditional, reference, transitions, rows[part], steps[part]
            )
            losses.append(LoopLoss(*(value.detach() for value in result)))
        if engine is not None:
            # the loss has its gradients already: of the backward pass, the denoiser's is all but about 0.1 ms
            with model_call("backward", "replay", part.start, device):
                engine.backward(result.loss * (size / count))
    return losses


@torch.no_grad()
def _reference(sampler: Sampler, sample: Tensor, timestep: Tensor, text: Conditioning, size: int) -> Tensor:
    """The guided output of the policy before training, ``[size, *L]``."""
    with sampler.policy.reference(), model_call("denoiser", "replay", device=sample.device):
        output, unconditional = sampler.policy.predict(sample, timestep, text, sampler.guidance_scale)
    if unconditional is not None:
        output = torch.lerp(unconditional, output, sampler.guidance_scale)
    return output[:size]


def _statistics(
    losses: Sequence[LoopLoss], surrogate: Surrogate, trajectories: Trajectories, pairs: tuple[Tensor, Tensor]
) -> UpdateStatistics:
    """Of an update's microbatches, in the order of its pairs.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    with range_("statistics", "replay"):
        rows, steps = (index.to(trajectories.logprob.device) for index in pairs)
        ratio = torch.cat([loss.ratio for loss in losses]).double()
        logprob = torch.cat([loss.logprob for loss in losses]).double()
        change = logprob - trajectories.logprob[steps, rows].double()
        deviation = (ratio - 1).abs()
        sizes = torch.tensor([len(loss.ratio) for loss in losses], dtype=torch.float64)
        means = torch.stack([loss.loss.double().cpu() for loss in losses])
        clip_range = surrogate.clip_range
        outside = 0.0 if clip_range is None else float((deviation > clip_range).double().mean())
        zero = torch.cat([surrogate.zero_gradient(loss) for loss in losses])
        statistics = UpdateStatistics(
            loss=float((means * sizes).sum() / sizes.sum()),
            # E[r − 1 − log r], an estimate of KL(sampling policy ‖ present policy) that is never negative
            kl=float((ratio - 1 - change.clamp(-20, 20)).mean()),
            kl_reference=float(torch.cat([loss.kl for loss in losses]).double().mean()),
            clip_fraction=float(torch.cat([loss.clipped for loss in losses]).double().mean()),
            ratio_outside_clip=outside,
            ratio_max_deviation=float(deviation.max()),
            logprob_change=float(change.abs().mean()),
            zero_gradient=float(zero.double().mean()),
        )
    if not (math.isfinite(statistics.loss) and math.isfinite(statistics.ratio_max_deviation)):
        at_fault = rows[~logprob.isfinite()].unique().tolist() or rows.unique().tolist()
        raise NonFiniteError("the loss is not finite", at_fault)
    return statistics
