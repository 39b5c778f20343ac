"""Derives every random number of a run from the run's seed and the name of its purpose."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *path: str | int) -> int:
    """Returns the seed in [0, 2⁶³) of one purpose, such as ``derive(0, "prompts", iteration)``."""
    name = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """Returns a CPU generator seeded for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *path))


def row_seeds(seed: int, purpose: str, iteration: int, prompts: list[int], samples: int) -> Tensor:
    """Returns the noise seeds of an iteration's rows: int64 ``[len(prompts) · samples]``, ordered by prompt.

    ``prompts`` are the positions of the prompts in the iteration. A row's noise therefore does not depend on the rows
    that are sampled with it.
    """
    return torch.tensor(
        [derive(seed, purpose, iteration, p, k) for p in prompts for k in range(samples)], dtype=torch.int64
    )
