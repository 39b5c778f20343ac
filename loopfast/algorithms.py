"""The policy-gradient algorithms: a table with a row for each, and the advantages of a row.

=================  =======================  ====================  =======  ===================================
name               baseline                 normalize             clipped  source
=================  =======================  ====================  =======  ===================================
loop               mean of the other K−1    batch std             yes      LOOP, arXiv 2503.00897
ppo                prompt's running mean    prompt's running std  yes      DDPO-IS, arXiv 2305.13301
rloo               mean of the other K−1    none                  no       RLOO, arXiv 2402.14740
reinforce          batch mean               none                  no       Williams 1992; DDPO-SF with baseline
reinforce_plain    none                     none                  no       Williams 1992
grpo               group mean               group std             yes      GRPO, arXiv 2402.03300
=================  =======================  ====================  =======  ===================================
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loopfast_kernels import leave_one_out

Baseline = Literal["leave_one_out", "group_mean", "batch_mean", "prompt_running_mean", "none"]
Normalize = Literal["batch_std", "group_std", "prompt_running_std", "none"]

# bounds the scale of rewards that hardly differ
EPSILON = 1e-6


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    With ``clip_range`` None the ratio is not clipped, and the surrogate holds for one pass over the samples only.
    """

    name: str
    baseline: Baseline
    normalize: Normalize
    clip_range: float | None

    @property
    def needs_group(self) -> bool:
        """True if a prompt needs at least two samples, which are compared with each other."""
        return self.baseline in ("leave_one_out", "group_mean")

    @property
    def single_epoch(self) -> bool:
        """True if samples are used for one pass only."""
        return self.clip_range is None


ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("loop", "leave_one_out", "batch_std", clip_range=0.2),
        Algorithm("ppo", "prompt_running_mean", "prompt_running_std", clip_range=0.2),
        Algorithm("rloo", "leave_one_out", "none", clip_range=None),
        Algorithm("reinforce", "batch_mean", "none", clip_range=None),
        Algorithm("reinforce_plain", "none", "none", clip_range=None),
        Algorithm("grpo", "group_mean", "group_std", clip_range=0.2),
    )
}


class PromptStatistics:
    """Running mean and standard deviation of each prompt's latest rewards, as in DDPO.

    A prompt seen fewer than ``min_count`` times takes the statistics of the current batch. (Source: DDPO, arXiv
    2305.13301, section 5; ``PerPromptStatTracker`` of its published code.)
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        self.min_count = min_count
        self._rewards: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def update(self, prompts: list[str], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Adds rewards ``[G, K]`` of G prompts; returns each prompt's mean and standard deviation.

        Both are float64 ``[G, 1]``. If all rewards are equal, the mean is exactly that reward, and the deviation 0.
        """
        batch = rewards.double()
        for prompt, row in zip(prompts, batch.tolist(), strict=True):
            self._rewards[prompt].extend(row)
        means, stds = [], []
        for prompt in prompts:
            seen = torch.tensor(self._rewards[prompt], dtype=torch.float64)
            source = seen if len(seen) >= self.min_count else batch.flatten()
            relative = source - source[0]
            means.append(source[0] + relative.mean())
            stds.append(spread(relative))
        return torch.stack(means).unsqueeze(1), torch.cat(stds).unsqueeze(1)

    def state_dict(self) -> dict[str, list[float]]:
        """Returns the buffers in a form that JSON can hold."""
        return {prompt: list(seen) for prompt, seen in self._rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restores the buffers of `state_dict`."""
        self._rewards.clear()
        for prompt, seen in state.items():
            self._rewards[prompt].extend(seen)


def deviations(values: Tensor) -> Tensor:
    """Computes the differences from the mean over the last dimension: float64 ``[..., N]``; exactly 0 for equal values.

    The first value is subtracted before the mean is taken: the sum of equal numbers is rounded, and a tiny standard
    deviation would enlarge the rounding error. The sum of zeros is exact.
    """
    values = values.double()
    relative = values - values[..., :1]
    return relative - relative.mean(-1, keepdim=True)


def spread(values: Tensor) -> Tensor:
    """Computes the standard deviation over the last dimension: float64 ``[..., 1]``; exactly 0 for equal values."""
    return deviations(values).square().mean(-1, keepdim=True).sqrt()


def advantages(
    algorithm: Algorithm,
    rewards: Tensor,
    prompts: list[str],
    statistics: PromptStatistics,
    *,
    normalize: Literal["auto", "std", "none"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes the advantages before scaling, and their scale.

    Args:
        algorithm: the row of the table.
        rewards: float32 ``[G, K]``.
        prompts: the G prompts.
        statistics: the prompts' history; updated where the algorithm keeps one.
        normalize: ``auto`` takes the row's; ``std`` the batch's standard deviation; ``none`` no scale.

    Returns:
        ``(difference [G, K], scale [G, 1] or [])``, both float32; the advantage is their product. For leave-one-out
        rows the ``loop_loss`` op computes the same difference from the rewards. Equal rewards have a difference of
        exactly 0 from their mean, and a scale of 0: nothing can be learned from them.
    """
    mean = std = torch.zeros(())
    if algorithm.baseline == "prompt_running_mean":
        mean, std = statistics.update(prompts, rewards)
    if algorithm.baseline == "leave_one_out":
        difference = leave_one_out(rewards).double()
    elif algorithm.baseline == "group_mean":
        difference = deviations(rewards)
    elif algorithm.baseline == "batch_mean":
        difference = deviations(rewards.flatten()).view_as(rewards)
    else:
        difference = rewards.double() - mean

    kind = {"auto": algorithm.normalize, "std": "batch_std", "none": "none"}[normalize]
    if kind == "none":
        return difference.float(), torch.ones(())
    if kind == "batch_std":
        std = spread(difference.flatten()).squeeze()
    elif kind == "group_std":
        std = spread(rewards)
    return difference.float(), torch.where(std > 0, 1.0 / (std + EPSILON), 0.0).float()
