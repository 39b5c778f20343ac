"""The loss of an iteration's (row, step) pairs: PPO's surrogate, by an algorithm's row of the table."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from loopfast.algorithms import ALGORITHMS, PromptStatistics, advantages
from loopfast.config import AlgorithmConfig
from loopfast.rollout import Sampler
from loopfast_kernels import LoopLoss, clipped_loss, loop_loss


class Surrogate:
    """The loss of one iteration's pairs, by an algorithm's row of the table.

    Leave-one-out algorithms hand the rewards to the kernel, which works out the advantage itself; the others hand it
    their advantages.

    Args:
        config: the section ``algorithm``.
        rewards: float32 ``[G, K]``; NaN for all images of a prompt that is left out: the others' advantages, their
            scale and the history are as if it were not there, and its own are 0.
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
        left = rewards.isfinite().all(1)
        difference, scale = advantages(
            row,
            rewards[left],
            [prompt for prompt, there in zip(prompts, left.tolist(), strict=True) if there],
            statistics,
            normalize=config.advantage.normalize,
        )
        self._fused = row.baseline == "leave_one_out" and scale.dim() == 0
        self._rewards = rewards.nan_to_num(0.0).to(device)
        self._scale = scale.to(device)
        advantage = torch.zeros_like(rewards)
        advantage[left] = difference * scale
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
            guidance_scale=1.0 if unconditional is None else sampler.guidance_scale,
            reference_output=reference,
            kl_weight=self._config.kl_weight,
            reduction=sampler.reduction,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a penalty on the KL divergence from the policy before training."""
        return self._config.kl_weight > 0

    def zero_gradient(self, loss: LoopLoss) -> Tensor:
        """Bool ``[M]``: which of the pairs' losses have no gradient; none where each has that of its KL divergence."""
        if self.needs_reference:
            return torch.zeros_like(loss.clipped)
        return loss.clipped | (loss.advantage == 0)
