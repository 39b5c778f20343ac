from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

STEPS = 10

# Rows and latent shape: the embedded model's rollout and update, one microbatch of Stable Diffusion 1.5.
SIZES = {"embedded-128": (128, (4, 8, 8)), "embedded-1024": (1024, (4, 8, 8)), "sd15-8": (8, (4, 64, 64))}


@dataclass(frozen=True)
class Batch:
    model_output: Tensor
    uncond_output: Tensor
    sample: Tensor
    prev_sample: Tensor
    table: Tensor
    step: Tensor
    seed: Tensor


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def batch(request: pytest.FixtureRequest) -> Batch:
    rows, shape = request.param
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return Batch(
        model_output=normal(rows, *shape),
        uncond_output=normal(rows, *shape),
        sample=normal(rows, *shape),
        prev_sample=normal(rows, *shape),
        table=torch.tensor([1.2, -0.5, 0.5]).repeat(STEPS, 1),
        step=torch.randint(STEPS, (rows,), generator=generator),
        seed=torch.arange(rows),
    )


@pytest.fixture(autouse=True)
def _machine(benchmark: Any) -> None:
    """Say with every result what it was measured on."""
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
