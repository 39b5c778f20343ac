from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfast.evaluation.benchmark.bootstrap import Interval, mean_interval

numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)
samples = st.lists(numbers, min_size=1, max_size=20)


@given(samples)
def test_the_interval_holds_the_mean_and_lies_between_the_values(values: list[float]) -> None:
    found = mean_interval(values, resamples=200)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.low <= found.mean <= found.high
    assert found.low >= min(values) - 1e-9
    assert found.high <= max(values) + 1e-9


@given(samples, st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_bounds(values: list[float], seed: int) -> None:
    assert mean_interval(values, seed=seed, resamples=50) == mean_interval(values, seed=seed, resamples=50)


@given(samples, numbers, st.floats(0.125, 8, width=32))
def test_it_moves_and_scales_with_the_values(values: list[float], shift: float, scale: float) -> None:
    before = mean_interval(values, resamples=100)
    after = mean_interval([shift + scale * value for value in values], resamples=100)
    for name in ("mean", "low", "high"):
        assert getattr(after, name) == pytest.approx(
            shift + scale * getattr(before, name), rel=1e-6, abs=1e-6
        )


@given(numbers, st.integers(1, 30))
def test_equal_values_leave_no_doubt(value: float, count: int) -> None:
    found = mean_interval([value] * count, resamples=50)
    assert found.low == pytest.approx(value)
    assert found.high == pytest.approx(value)


@given(st.lists(numbers, min_size=2, max_size=20, unique=True))
def test_a_higher_level_is_wider(values: list[float]) -> None:
    narrow, wide = (mean_interval(values, level=level, resamples=200) for level in (0.5, 0.99))
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_it_holds_the_truth_as_often_as_it_says(seed: int) -> None:
    """Of 200 samples of 40 normal values, the 90 % interval holds the mean, 0, of about 180."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(200, 40, generator=random)
    found = [mean_interval(row.tolist(), level=0.9, resamples=300) for row in values]
    held = sum(interval.low <= 0 <= interval.high for interval in found)
    assert 150 <= held <= 197


def test_pairs_are_drawn_together() -> None:
    """The difference of two models is far surer than either, where prompts differ more than models."""
    before = [float(value) for value in range(100)]
    after = [value + 1 + 0.1 * (index % 2) for index, value in enumerate(before)]
    difference = mean_interval([b - a for a, b in zip(before, after, strict=True)])
    assert difference.mean == pytest.approx(1.05)
    assert difference.high - difference.low < 0.05
    alone = mean_interval(before)
    assert alone.high - alone.low > 5


def test_bounds_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 1.0, 5.0]
    expected = mean_interval(values, resamples=100)
    monkeypatch.setattr("loopfast.evaluation.benchmark.bootstrap._AT_ONCE", 10)
    assert mean_interval(values, resamples=100) == expected


def test_one_value_is_its_own_interval() -> None:
    assert mean_interval([0.25]) == Interval(0.25, 0.25, 0.25)
    assert mean_interval([0.25]).as_dict() == {"mean": 0.25, "low": 0.25, "high": 0.25}


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_values_that_have_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite value or more"):
        mean_interval(values)


@pytest.mark.parametrize(("level", "deviations"), [(0.95, 1.95996), (0.5, 0.67449)])
def test_the_interval_of_many_values_is_the_normal_ones(level: float, deviations: float) -> None:
    """By the central limit theorem: mean ± z · s / √P."""
    values = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean_interval(values.tolist(), level=level)
    half = deviations * values.std(correction=0).item() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
