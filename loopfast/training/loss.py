"""The advantages of an iteration's images, and PPO's clipped loss of its (trajectory, step) pairs.

For image i of a prompt, with reward r_i and the K rewards of that prompt (LOOP, arXiv 2503.00897)::

    A_i = (r_i − mean of the other K − 1 rewards) · scale               scale: 1 / standard deviation
    ρ = exp(log p(x_{t-1} | x_t) − log p of the policy that sampled)
    loss = mean over pairs of  max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)) + kl_weight · KL

`loopfast.algorithms` has the table of the other algorithms, which differ in A and in the clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loopfast.algorithms import ALGORITHMS, PromptStatistics, advantages
from loopfast.config import AlgorithmConfig
from loopfast.rollout import Sampler
from loopfast_kernels import LoopLoss, clipped_loss, loop_loss


@dataclass(frozen=True)
class Advantages:
    """The advantages of an iteration's images.

    Attributes:
        rewards: float32 ``[G, K]``; 0 for a prompt that is not kept.
        scale: float32 ``[]`` or ``[G, 1]``, the factor of the difference from the other rewards.
        values: float32 ``[G · K]``, the advantages; 0 for a prompt that is not kept.
        fused: whether the op computes them from rewards and scale, as it does for leave-one-out.
    """

    rewards: Tensor
    scale: Tensor
    values: Tensor
    fused: bool


def compare(
    config: AlgorithmConfig,
    rewards: Tensor,
    kept: Tensor,
    prompts: list[str],
    statistics: PromptStatistics,
    device: torch.device,
) -> Advantages:
    """Computes the advantages of an iteration's images by the algorithm's row of the table.

    Args:
        config: the section ``algorithm``.
        rewards: float32 ``[G, K]``.
        kept: bool ``[G]``. The advantages of a prompt that is not kept are 0; the other advantages, their scale and the
            history are as if it had not been sampled.
        prompts: the G prompts.
        statistics: the prompts' history, updated by algorithms that keep one.
        device: the device of the latents.
    """
    row = ALGORITHMS[config.name]
    difference, scale = advantages(
        row,
        rewards[kept],
        [prompts[index] for index in kept.nonzero()[:, 0].tolist()],
        statistics,
        normalize=config.advantage.normalize,
    )
    values = torch.zeros_like(rewards)
    values[kept] = difference * scale
    if config.advantage.clip is not None:
        values = values.clamp(-config.advantage.clip, config.advantage.clip)
    return Advantages(
        rewards.nan_to_num(0.0).to(device),
        scale.to(device),
        values.flatten().to(device),
        fused=row.baseline == "leave_one_out" and scale.dim() == 0,
    )


class PolicyLoss:
    """The loss of one iteration's pairs.

    Args:
        config: the section ``algorithm``.
        advantages: the advantages of the iteration's images.
    """

    def __init__(self, config: AlgorithmConfig, advantages: Advantages) -> None:
        default = ALGORITHMS[config.name].clip_range
        self.clip_range = default if config.clip_range is None else config.clip_range
        self._config, self._advantages = config, advantages

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
        """Computes the loss of M pairs from the outputs of policy and reference, in one fused op.

        Args:
            sampler: the sampler of the transitions.
            output, unconditional, reference: ``[M, *L]`` each.
            transitions: ``(sample, prev_sample, old_logprob)`` of the pairs, see `Trajectories.pairs`.
            rows, steps: int64 ``[M]``, the pairs.
        """
        sample, prev_sample, old_logprob = transitions
        if self._advantages.fused:
            op = partial(
                loop_loss,
                rewards=self._advantages.rewards,
                trajectory=rows,
                advantage_scale=self._advantages.scale,
                advantage_clip=self._config.advantage.clip,
            )
        else:
            op = partial(clipped_loss, advantage=self._advantages.values[rows])
        return op(
            output,
            sample,
            prev_sample,
            sampler.schedule.table,
            steps,
            old_logprob,
            clip_range=self.clip_range,
            uncond_output=unconditional,
            guidance_scale=1.0 if unconditional is None else sampler.guidance_scale,
            reference_output=reference,
            kl_weight=self._config.kl_weight,
            reduction=sampler.reduction,
        )

    @property
    def needs_reference(self) -> bool:
        """True if the loss has a penalty on the KL divergence from the policy before training."""
        return self._config.kl_weight > 0

    def zero_gradient(self, loss: LoopLoss) -> Tensor:
        """Returns bool ``[M]``: the pairs whose loss has no gradient. With a KL penalty every pair has one."""
        if self.needs_reference:
            return torch.zeros_like(loss.clipped)
        return loss.clipped | (loss.advantage == 0)
