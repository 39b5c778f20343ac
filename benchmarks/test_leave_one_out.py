from __future__ import annotations

import torch

from loopfast_kernels import leave_one_out


def test_leave_one_out(benchmark):
    benchmark(leave_one_out, torch.randn(256, 4))
