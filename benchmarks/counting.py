"""The costs of a call besides time: its peak memory and its kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loopfast_kernels import buffers

_MEMORY_EVENT = "[memory]"


@contextmanager
def _recording(*activities: ProfilerActivity, **options: Any) -> Iterator[profile]:
    """Runs the profiler without changing our ops: they take their usual path, not the one that appears in its trace."""
    module = torch._C._autograd
    enabled = module._profiler_enabled
    module._profiler_enabled = lambda: False
    try:
        with profile(activities=activities, **options) as profiler:
            yield profiler
    finally:
        module._profiler_enabled = enabled


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Runs a call and returns the peak of the memory that it allocates, its results included.

    Memory that torch's allocators do not manage is not counted, such as a buffer of a C++ function. Freeing older
    memory does not reduce the result. Blocks that our ops keep for their results are freed before the call, and count
    when they are allocated again.

    Args:
        call: the function to run; it should have run before, so that caches of its first call do not count.
        device: ``cpu`` or ``cuda``; only memory of this kind of device counts.

    Returns:
        Bytes, 0 for a call that allocates nothing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    buffers.clear()
    with _recording(ProfilerActivity.CPU, profile_memory=True) as profiler:
        call()
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == _MEMORY_EVENT and event.device_type().name == "CPU"
    ]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def kernel_launches(call: Callable[[], object]) -> int:
    """Returns the number of kernels, copies and fills that a call starts on the GPU."""
    torch.cuda.synchronize()
    with _recording(ProfilerActivity.CPU, ProfilerActivity.CUDA) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type.name == "CUDA" and not event.is_user_annotation for event in profiler.events()
    )
