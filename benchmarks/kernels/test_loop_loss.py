"""Forward and backward, with guidance."""

from __future__ import annotations

import pytest
import torch

from ..cases import COMPETITORS, Case, grid

CPU = [
    ("SD", 1, torch.float32, ("ours", "eager")),
    ("SD", 16, torch.float32, COMPETITORS),
    ("SD", 64, torch.float32, COMPETITORS),
    ("SD", 256, torch.float32, ("ours", "eager")),
    ("SD", 16, torch.bfloat16, COMPETITORS),
    ("SDXL", 16, torch.float32, ("ours", "eager")),
    ("SDXL", 64, torch.float32, ("ours", "eager")),
    ("SD3", 16, torch.float32, ("ours", "eager")),
    ("SD3", 16, torch.bfloat16, ("ours",)),
]
CPU_CLIPPED = [
    ("SD", 16, torch.float32, COMPETITORS),
    ("SD", 64, torch.float32, ("ours", "eager")),
]


@pytest.mark.parametrize("case", grid("loop_loss", CPU), ids=str)
def test_loop_loss(measure, case: Case):
    measure(case)


@pytest.mark.parametrize("case", grid("clipped_loss", CPU_CLIPPED), ids=str)
def test_clipped_loss(measure, case: Case):
    measure(case)
