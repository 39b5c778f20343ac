"""Compared with ``torch.randn``, whose noise cannot be reproduced from a seed and a step."""

from __future__ import annotations

import pytest
import torch

from ..cases import Case, grid

CPU = [
    ("SD", 16, torch.float32, ("ours", "eager")),
    ("SD", 64, torch.float32, ("ours", "eager")),
    ("SD3", 16, torch.float32, ("ours", "eager")),
]


@pytest.mark.parametrize("case", grid("philox_normal", CPU), ids=str)
def test_philox_normal(measure, case: Case):
    measure(case)
