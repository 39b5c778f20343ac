"""The time of a call: by the clock on a CPU, by events on a GPU; and the time that a GPU's host needs for it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch

T = TypeVar("T")

MIN_ROUNDS, MAX_ROUNDS = 5, 1000
WARM_UP_SECONDS = 0.1

# The GPU sleeps this long before every timed call, so that the host has finished the launches before the call
# begins: this measures the work, and not the speed of Python.
_SLEEP_CYCLES = 4_000_000
_SLEEP_SECONDS = 0.003
_CUDA_ROUNDS = (20, 100)
_HOST_ROUNDS = 100


def rotating(make: Callable[[int], T], moved: Callable[[T], int], device: torch.device) -> list[T]:
    """Returns inputs to use in turn: one set on a CPU; on a GPU as many as exceed its L2 cache three times, 2048 at
    most.

    Args:
        make: makes the set of a seed.
        moved: bytes that a call with a set moves.
        device: the device of the inputs.
    """
    inputs = [make(0)]
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += map(make, range(1, min(math.ceil(3 * cache / moved(inputs[0])), 2048)))
    return inputs


def durations(
    run: Callable[[T], object], inputs: Sequence[T], device: torch.device, budget: float
) -> list[float]:
    """Times a call repeatedly, after warming it up.

    Args:
        run: the function to time.
        inputs: its arguments, used in turn.
        device: the device on which it runs.
        budget: seconds to spend, without the warm-up; at least `MIN_ROUNDS` rounds are made.

    Returns:
        Seconds of every round.
    """
    run(inputs[0])
    measure = _cuda_durations if device.type == "cuda" else _cpu_durations
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return measure(run, inputs, budget)
    finally:
        if collecting:
            gc.enable()


def _cpu_durations(run: Callable[[T], object], inputs: Sequence[T], budget: float) -> list[float]:
    def once(index: int) -> float:
        start = time.perf_counter()
        run(inputs[index % len(inputs)])
        return time.perf_counter() - start

    fastest = math.inf
    end = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < end:
        fastest = min(fastest, once(0))
    rounds = min(max(int(budget / fastest), MIN_ROUNDS), MAX_ROUNDS)
    return [once(index) for index in range(rounds)]


def _cuda_durations(run: Callable[[T], object], inputs: Sequence[T], budget: float) -> list[float]:
    def rounds(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for index, (start, end) in enumerate(events):
            torch.cuda._sleep(_SLEEP_CYCLES)
            start.record()
            run(inputs[index % len(inputs)])
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    fewest, most = _CUDA_ROUNDS
    estimate = min(rounds(3))
    return rounds(min(max(int(budget / (estimate + _SLEEP_SECONDS)), fewest), most))


def host_seconds(run: Callable[[T], object], inputs: Sequence[T]) -> float:
    """Returns the time until a call returns to the host of an idle GPU, without waiting for the GPU's work.

    Args:
        run: the function to time; it has run before.
        inputs: its arguments, used in turn.

    Returns:
        The median of 100 calls.
    """

    def once(index: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(inputs[index % len(inputs)])
        return time.perf_counter() - start

    seconds = statistics.median(map(once, range(_HOST_ROUNDS)))
    torch.cuda.synchronize()
    return seconds


def settle_heap() -> None:
    """Brings glibc's allocator to the state that it has after a model has run.

    Freeing a large block permanently raises the size up to which memory is kept and not returned to the system, to 32
    MB at most. Before that, every temporary of eager torch costs page faults, and the time of a case depends on the
    cases that ran before it.
    """
    torch.zeros(31 * 2**20, dtype=torch.uint8)


class Playback:
    """A clock that plays recorded durations back, so that pytest-benchmark's table can show them.

    Two readings belong to each duration, which is their difference.
    """

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, durations: Sequence[float]) -> None:
        """Sets the durations to play."""
        self._readings = chain.from_iterable((0.0, duration) for duration in durations)

    def __call__(self) -> float:
        return next(self._readings)


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Returns the bytes read and written per second by the copy of one large tensor.

    Args:
        device: the device of the tensor.
        megabytes: the size of the tensor; far beyond any cache.
    """
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.ones_like(source)
    seconds = durations(target.copy_, [source], device, budget=1.0)
    return 2 * source.nbytes / sorted(seconds)[len(seconds) // 2]
