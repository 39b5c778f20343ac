"""Properties of a processor's libraries that the tests of a whole run may depend on."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F


@cache
def rows_are_alike() -> bool:
    """Returns whether a row has the same result at any place in a batch; oneDNN and MKL do not promise it."""
    generator = torch.Generator().manual_seed(0)
    image, kernel = (
        torch.randn(8, 16, 8, 8, generator=generator),
        torch.randn(16, 16, 3, 3, generator=generator),
    )
    text, matrix = torch.randn(8, 16, 64, generator=generator), torch.randn(64, 64, generator=generator)
    order = torch.randperm(8, generator=generator)
    return all(
        torch.equal(
            compute(rows.to(dtype), by.to(dtype))[order], compute(rows[order].to(dtype), by.to(dtype))
        )
        for compute, rows, by in ((F.conv2d, image, kernel), (F.linear, text, matrix))
        for dtype in (torch.float32, torch.bfloat16)
    )


def no_deviation() -> object:
    """Returns the largest expected deviation of the ratio from 1 before the first update: 0 if rows are alike, else a
    few roundings.
    """
    return pytest.approx(0.0, abs=0.0 if rows_are_alike() else 0.05)
