"""How long a call takes: the clock on a CPU, events on a GPU; and what a GPU's host does for it."""

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

# The GPU sleeps this long before every timed call, so that the host is done with launching before the call
# begins: what is measured is the work, not how fast Python can ask for it.
_SLEEP_CYCLES = 4_000_000
_SLEEP_SECONDS = 0.003
_CUDA_ROUNDS = (20, 100)
_HOST_ROUNDS = 100


def rotating(make: Callable[[int], T], moved: Callable[[T], int], device: torch.device) -> list[T]:
    """Inputs to take in turn: one set on a CPU; on a GPU as many as exceed its L2 cache three times, 2048 at most.

    Args:
        make: gives the set of a seed.
        moved: bytes that a call with a set moves.
        device: where they are.
    """
    inputs = [make(0)]
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += map(make, range(1, min(math.ceil(3 * cache / moved(inputs[0])), 2048)))
    return inputs


def durations(
    run: Callable[[T], object], inputs: Sequence[T], device: torch.device, budget: float
) -> list[float]:
    """Time a call, again and again, after warming it up.

    Args:
        run: what is timed.
        inputs: its argument, taken in turn.
        device: where it runs.
        budget: seconds to spend, warming up not counted; there are at least `MIN_ROUNDS` rounds.

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
    """Time until a call returns to the host of an idle GPU, the work being asked for and not awaited.

    Args:
        run: what is timed; it has run before.
        inputs: its argument, taken in turn.

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
    """Bring glibc's allocator to the state it is in after a model has run.

    Freeing a large block raises, for good, the size up to which memory is kept rather than returned to the system, to
    32 MB at most. Before that every temporary of eager torch costs page faults, and what a case costs depends on which
    cases ran before it.
    """
    torch.zeros(31 * 2**20, dtype=torch.uint8)


class Playback:
    """A clock that plays recorded durations back, so that pytest-benchmark's table can show them.

    Two readings belong to each duration; their difference is it.
    """

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, durations: Sequence[float]) -> None:
        """Set what is played."""
        self._readings = chain.from_iterable((0.0, duration) for duration in durations)

    def __call__(self) -> float:
        return next(self._readings)


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes read and written per second by the copy of one large tensor.

    Args:
        device: where.
        megabytes: the size of the tensor; far beyond any cache.
    """
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.ones_like(source)
    seconds = durations(target.copy_, [source], device, budget=1.0)
    return 2 * source.nbytes / sorted(seconds)[len(seconds) // 2]
