from __future__ import annotations

import pytest
import torch

from ..cases import Case, grid

CPU = [
    ("rewards", 64, torch.float32, ("ours", "eager", "compile")),
    ("rewards", 4096, torch.float32, ("ours", "eager", "compile")),
]


@pytest.mark.parametrize("case", grid("leave_one_out", CPU, shapes=("rewards",)), ids=str)
def test_leave_one_out(measure, case: Case):
    measure(case)
