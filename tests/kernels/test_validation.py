from __future__ import annotations

import pytest
import torch

from loopfast_kernels.validation import check_index, check_table


def test_indices_are_looked_at_on_the_cpu_only():
    with pytest.raises(ValueError, match=r"step must lie in \[0, 2\), got 2"):
        check_index("step", torch.arange(3), 2)
    # A meta tensor has no values: looking at them would fail.
    check_index("step", torch.empty(3, dtype=torch.int64, device="meta"), 2)


def test_sigmas_are_looked_at_on_the_cpu_only():
    table = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, -0.5]])
    check_table(table[:1])
    with pytest.raises(ValueError, match=r"table has sigma -0.5 at step 1: it must not be negative"):
        check_table(table)
    with pytest.raises(ValueError, match="table has sigma nan at step 0"):
        check_table(torch.full((1, 3), torch.nan))
    check_table(torch.empty(3, 3, device="meta"))
