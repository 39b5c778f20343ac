"""Memory a call takes at its peak, beyond what was allocated before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_MEMORY_EVENT = "[memory]"


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Run a call and say how much memory was allocated at its peak, its results included.

    What goes past torch's allocators is not seen, such as a buffer of a C++ function's own.

    Args:
        call: what to run; it should have run before, so that caches of its first call do not count.
        device: ``cpu`` or ``cuda``; only memory of this kind of device counts.

    Returns:
        Bytes, 0 for a call that allocates nothing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # Held until the recording ends: freeing the results must not count as memory won.
        result = call()
    del result
    recorded = profiler.profiler.kineto_results.events()
    events = [
        event for event in recorded if event.name() == _MEMORY_EVENT and event.device_type().name == "CPU"
    ]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
