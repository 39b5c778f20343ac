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
CPU_GUIDED = [
    ("SD", 16, torch.float32, COMPETITORS),
    ("SD", 64, torch.float32, ("ours", "eager")),
    ("SDXL", 64, torch.float32, ("ours",)),
    ("SD3", 16, torch.float32, ("ours",)),
]


@pytest.mark.parametrize("case", grid("denoise_step", CPU), ids=str)
def test_denoise_step(measure, case: Case):
    measure(case)


@pytest.mark.parametrize("case", grid("denoise_step_guided", CPU_GUIDED), ids=str)
def test_denoise_step_with_guidance(measure, case: Case):
    measure(case)
