"""Forward and backward, with guidance unless a case has another setting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ..cases import COMPETITORS, Case, CpuGrid, device, grid

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
CPU_UNGUIDED = [
    ("SD", 16, torch.float32, COMPETITORS),
    ("SD", 64, torch.float32, COMPETITORS),
]


def in_both_processes(op: str, cpu: CpuGrid) -> Iterator[Case]:
    """On a CPU some settings are measured twice: here, where freed memory is kept, and then in a plain process."""
    for case in grid(op, cpu):
        yield case
        if (
            device().type == "cpu"
            and (case.shape, case.dtype) == ("SD", torch.float32)
            and 16 <= case.rows <= 64
        ):
            yield replace(case, plain=True)


@pytest.mark.parametrize("case", in_both_processes("loop_loss", CPU), ids=str)
def test_loop_loss(measure, case: Case):
    measure(case)


@pytest.mark.parametrize("case", in_both_processes("loop_loss_unguided", CPU_UNGUIDED), ids=str)
def test_loop_loss_without_guidance(measure, case: Case):
    measure(case)


@pytest.mark.parametrize("case", grid("clipped_loss", CPU_CLIPPED), ids=str)
def test_clipped_loss(measure, case: Case):
    measure(case)
