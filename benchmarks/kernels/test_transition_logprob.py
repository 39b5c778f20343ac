"""With guidance."""

from __future__ import annotations

import pytest
import torch

from ..cases import COMPETITORS, Case, grid

CPU = [
    ("SD", 16, torch.float32, COMPETITORS),
    ("SD", 64, torch.float32, ("ours", "eager")),
    ("SDXL", 64, torch.float32, ("ours",)),
    ("SD3", 16, torch.float32, ("ours",)),
]


@pytest.mark.parametrize("case", grid("transition_logprob", CPU), ids=str)
def test_forward(measure, case: Case):
    measure(case)


@pytest.mark.parametrize("case", grid("transition_logprob_backward", CPU), ids=str)
def test_forward_and_backward(measure, case: Case):
    measure(case)
