from __future__ import annotations

import pytest
import torch

from loopfast_kernels.validation import check_index


def test_indices_are_looked_at_on_the_cpu_only():
    with pytest.raises(ValueError, match=r"step must lie in \[0, 2\), got values from 0 to 2"):
        check_index("step", torch.arange(3), 2)
    # A meta tensor has no values: looking at them would fail.
    check_index("step", torch.empty(3, dtype=torch.int64, device="meta"), 2)
