"""Leave-one-out advantages on a GPU."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import launch, total


@triton.jit
def load_group(
    rewards,  # float32 [G, K]
    group,
    samples,
    BLOCK: tl.constexpr,
):
    """Returns a group's first reward and the mean of all rewards relative to it.

    The advantages do not depend on a common offset; without it nothing is lost to rounding.
    """
    index = tl.arange(0, BLOCK)
    first = tl.load(rewards + group * samples)
    values = tl.load(rewards + group * samples + index, mask=index < samples, other=0.0)
    relative = tl.where(index < samples, values - first, 0.0)
    return first, tl.div_rn(total(relative, BLOCK), samples.to(tl.float32))


@triton.jit
def leave_one_out_kernel(
    advantage,  # float32 [G, K]
    rewards,  # float32 [G, K]
    samples,
    factor,
    BLOCK: tl.constexpr,
):
    """Writes the advantages of one group."""
    group = tl.program_id(0).to(tl.int64)
    first, mean = load_group(rewards, group, samples, BLOCK)
    index = tl.arange(0, BLOCK)
    values = tl.load(rewards + group * samples + index, mask=index < samples, other=0.0)
    tl.store(advantage + group * samples + index, (values - first - mean) * factor, mask=index < samples)


def leave_one_out_factor(samples: int) -> float:
    """Returns ``K / (K - 1)``: it turns the distance from the mean of all into that from the mean of the others."""
    return samples / (samples - 1)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Returns advantages like `rewards`, ``[..., K]`` float32, as `reference` does."""
    samples = rewards.shape[-1]
    advantage = torch.empty_like(rewards)
    launch(
        leave_one_out_kernel,
        (rewards.numel() // samples,),
        advantage,
        rewards,
        samples,
        leave_one_out_factor(samples),
        BLOCK=triton.next_power_of_2(samples),
        num_warps=1,
    )
    return advantage
