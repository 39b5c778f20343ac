"""Every random number of a run comes from its one seed and the name of what it is for."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *path: str | int) -> int:
    """A seed in [0, 2⁶³) for one purpose, such as ``derive(0, "prompts", iteration)``."""
    name = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator seeded for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *path))


def row_seeds(seed: int, purpose: str, iteration: int, prompts: list[int], samples: int) -> Tensor:
    """Noise seeds of an iteration's rows: int64 ``[len(prompts) · samples]``, a prompt's samples side by side.

    ``prompts`` are positions that tell the prompts of the iteration apart, so that a row keeps its noise whichever
    rows are sampled with it.
    """
    return torch.tensor(
        [derive(seed, purpose, iteration, p, k) for p in prompts for k in range(samples)], dtype=torch.int64
    )
