from __future__ import annotations

import math

import pytest
import torch

from loopfast_kernels import backend, transition_logprob
from loopfast_kernels.reduction import row_sum


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 255, 256, 1023, 4097])
def test_sum_is_accurate(length):
    values = torch.randn(4, length)
    exact = [math.fsum(row) for row in values.double().tolist()]
    tolerance = 2**-24 * math.log2(2 * length) * values.abs().sum(1).max().item()
    torch.testing.assert_close(
        row_sum(values).double(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("length", [1, 5, 63, 256, 1023])
def test_a_row_does_not_depend_on_its_neighbors(length):
    values = torch.randn(128, length)
    whole = row_sum(values)
    for rows in [*range(1, 10), 127, 128]:
        assert torch.equal(row_sum(values[:rows].clone()), whole[:rows])
        assert torch.equal(row_sum(values[-rows:]), whole[-rows:])


def test_a_row_does_not_depend_on_the_number_of_threads():
    values = torch.randn(2, 200_001)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = row_sum(values)
        torch.set_num_threads(2)
        assert torch.equal(row_sum(values), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("length", [1, 63, 65, 256, 4095, 4097, 20_000])
def test_the_native_library_adds_up_in_the_same_order(length):
    """Bit for bit: with a = 0 and b = 0 the log-probability is -1/2 of a sum of squares, less a constant."""
    values, zeros = torch.randn(5, length), torch.zeros(5, length)
    table, step = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(5, dtype=torch.int64)
    with backend("native"):
        logprob = transition_logprob(zeros, zeros, values, table, step, reduction="sum")
    constant = torch.tensor(math.log(math.sqrt(2 * math.pi))) * length
    assert torch.equal(logprob, row_sum(values * values).float() * -0.5 - constant)


def test_the_result_is_in_memory_of_its_own():
    values = torch.ones(3, 1)
    row_sum(values).add_(1)
    row_sum(values.double()).add_(1)
    assert torch.equal(values, torch.ones(3, 1))
