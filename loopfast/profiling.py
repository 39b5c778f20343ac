"""Ranges for profilers, and the measurement of an iteration's time.

`range_` marks code in Nsight (NVTX domain ``loopfast``) and in torch's profiler. `model_call` marks a call of the
denoiser, the VAE or a reward in the same way, and a `Meter` measures it. `phase` marks and measures a phase of an
iteration. Without a profiler a range costs well under a microsecond: NVTX then has no domain, which is checked once.
Ranges inside the capture of a CUDA graph show the capture and not the replay, which needs a range of its own.

A `Meter` measures on the timeline of the device: by clock readings on a CPU, and by events on a GPU, which the host
reads at the end of the iteration. Nothing waits in between.
"""

from __future__ import annotations

import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import nvtx
import torch

__all__ = ["DOMAIN", "Category", "Meter", "Times", "model_call", "nsys_command", "phase", "range_"]

DOMAIN = "loopfast"
Category = Literal["rollout", "reward", "replay", "optimizer", "evaluation", "checkpoint", "profile"]

Mark = float | torch.cuda.Event
"""A point in time: seconds of the host's clock, or an event in a GPU's stream."""

_NOTHING = nullcontext()
_profiled = torch._C._autograd._profiler_enabled
_current: Meter | None = None


class _Nsight:
    """The domain of NVTX. A tool is attached when the process starts or never."""

    def __init__(self) -> None:
        self._domain = nvtx.get_domain(DOMAIN)
        self.attached = isinstance(self._domain, nvtx.Domain)
        self._attributes: dict[tuple[str, str], Any] = {}

    def push(self, name: str, category: str, payload: int | None) -> None:
        """Opens a range. Each name is registered once."""
        attributes = self._attributes.get((name, category))
        if attributes is None:
            attributes = self._domain.get_event_attributes(name, None, category, 0)
            self._attributes[name, category] = attributes
        attributes.payload = 0 if payload is None else payload
        self._domain.push_range(attributes)

    def pop(self) -> None:
        """Closes the innermost range of this thread."""
        self._domain.pop_range()


_nsight = _Nsight()


def range_(name: str, category: Category, payload: int | None = None) -> AbstractContextManager[object]:
    """Context that marks code for profilers.

    Args:
        name: the name of the range; a constant, since profilers keep every name.
        category: the phase of the iteration.
        payload: a number that distinguishes ranges of one name, such as the denoising step.
    """
    meter = _current
    if meter is not None and (not meter.detailed or _capturing(meter.device)):
        meter = None
    if meter is None and not _profiled() and not _nsight.attached:
        return _NOTHING
    return _Range(name, category, payload, meter, None if meter is None else meter.device, False)


def model_call(
    name: str, category: Category, payload: int | None = None, device: torch.device | None = None
) -> AbstractContextManager[object]:
    """Context that marks a model call like `range_`, and adds its time to the model time of the current meter.

    Args:
        name, category, payload: as for `range_`. ``denoiser`` is the name of its forward calls, which are counted.
        device: the device whose time is measured. The capture of a CUDA graph does not count, but its replays do. None
            measures the host's time, which is right for calls that wait for their result.
    """
    meter = _current
    if meter is not None and _capturing(device):
        meter = None
    if meter is None and not _profiled() and not _nsight.attached:
        return _NOTHING
    return _Range(name, category, payload, meter, device, True)


@contextmanager
def phase(name: Category) -> Iterator[None]:
    """Context that marks a phase, and measures it in the current meter. The time of an inner phase is its own only."""
    meter = _current
    with range_(name, name):
        if meter is None or not meter.running:
            yield
            return
        around = meter.enter(name)
        try:
            yield
        finally:
            meter.enter(around)


@dataclass
class _Range:
    """One use of `range_` or `model_call`."""

    name: str
    category: str
    payload: int | None
    meter: Meter | None
    device: torch.device | None
    called: bool
    record: Any = None
    begin: Mark | None = None

    def __enter__(self) -> None:
        if _nsight.attached:
            _nsight.push(self.name, self.category, self.payload)
        if _profiled():
            name = f"{DOMAIN}/{self.category}/{self.name}"
            self.record = torch.profiler.record_function(name, str(self.payload))
            self.record.__enter__()
        if self.meter is not None:
            self.begin = self.meter.mark(self.device)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.begin is not None and self.meter is not None:
            self.meter.add(self.name, self.called, self.begin, self.meter.mark(self.device))
        if self.record is not None:
            self.record.__exit__(kind, error, traceback)
        if _nsight.attached:
            _nsight.pop()


@dataclass(frozen=True)
class Times:
    """The measured times of a part of a run, in seconds.

    Attributes:
        total: the whole time.
        phases: the time of each phase; together at most ``total``. The remaining time is in no phase.
        inside: the time during at least one model call, by phase; ``""`` is the time in no phase.
        calls: the number of model calls by name.
        called: the time of model calls by name; overlapping calls count twice.
        ranges: the time outside model calls by the name of the innermost range; only of a detailed meter.
    """

    total: float
    phases: dict[str, float] = field(default_factory=dict)
    inside: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    called: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> float:
        """The time during at least one model call."""
        return sum(self.inside.values())

    @property
    def outside_share(self) -> float:
        """The share of the whole time without a model call."""
        return 1.0 - self.model / self.total if self.total > 0 else 0.0


class Meter:
    """Measures one part of a run after another, each from `start` to `stop`.

    Args:
        devices: the devices of the models, first that of the training loop. A GPU's time is measured by events in its
            current stream.
        detailed: also measure every `range_`, which costs about a microsecond each.
    """

    def __init__(self, devices: Sequence[torch.device] = (), *, detailed: bool = False) -> None:
        self.detailed = detailed
        self.device = devices[0] if devices and devices[0].type == "cuda" else None
        self.running = False
        self._gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self._host_origin = 0.0
        self._origins: dict[torch.device, torch.cuda.Event] = {}
        self._thread = 0
        self._switches: list[tuple[Mark, str]] = []
        self._entries: list[tuple[str, bool, int, Mark, Mark]] = []

    def start(self) -> None:
        """Begins to measure, if it does not already. Waits once for the GPUs, to relate their clocks to the host's."""
        if self.running:
            return
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
            origin = _event(gpu)
            self._origins[origin.device] = origin
        self._host_origin = time.perf_counter()
        self._thread = threading.get_ident()
        self._entries = []
        self._switches = [(self.mark(self.device), "")]
        self.running = True

    @contextmanager
    def phase(self, name: Category) -> Iterator[None]:
        """Context like the function `phase`, in which this meter measures the model calls of all threads."""
        global _current
        before, _current = _current, self
        try:
            with phase(name):
                yield
        finally:
            _current = before

    def stop(self) -> Times:
        """Ends the measurement, waits for the GPUs, and returns the times."""
        end = self.mark(self.device)
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
        self.running = False
        last = self._seconds(end)
        moments = [(self._seconds(mark), name) for mark, name in self._switches]
        begin = moments[0][0]
        entries = [
            _Entry(name, called, thread, max(begin, self._seconds(start)), min(last, self._seconds(finish)))
            for name, called, thread, start, finish in self._entries
        ]
        calls = [entry for entry in entries if entry.called]
        busy = _Busy((entry.begin, entry.end) for entry in calls)
        phases: dict[str, float] = defaultdict(float)
        inside: dict[str, float] = defaultdict(float)
        for (moment, name), (following, _) in pairwise([*moments, (last, "")]):
            phases[name] += following - moment
            inside[name] += busy.within(moment, following)
        phases.pop("", None)
        called: dict[str, float] = defaultdict(float)
        for entry in calls:
            called[entry.name] += entry.end - entry.begin
        ranges = _outside((entry for entry in entries if entry.thread == self._thread), busy)
        return Times(
            last - begin,
            dict(phases),
            dict(inside),
            dict(Counter(entry.name for entry in calls)),
            dict(called),
            ranges if self.detailed else {},
        )

    def enter(self, name: str) -> str:
        """Switches to another phase and returns the previous one; ``""`` is no phase."""
        before = self._switches[-1][1]
        self._switches.append((self.mark(self.device), name))
        return before

    def mark(self, device: torch.device | None) -> Mark:
        """Returns the present time on a device's timeline, or the host's for None."""
        if device is None or device.type != "cuda":
            return time.perf_counter()
        return _event(device)

    def add(self, name: str, called: bool, begin: Mark, end: Mark) -> None:
        """Adds a range from any thread; ``called`` marks a model call."""
        if self.running:
            self._entries.append((name, called, threading.get_ident(), begin, end))

    def _seconds(self, mark: Mark) -> float:
        """Returns the seconds from the start of the measurement to a point in time."""
        if isinstance(mark, float):
            return mark - self._host_origin
        return self._origins[mark.device].elapsed_time(mark) / 1e3


def _event(gpu: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(gpu))
    return event


def _capturing(device: torch.device | None) -> bool:
    """Returns whether a CUDA graph is being captured, so that calls are recorded and not executed."""
    return device is not None and device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_NSYS = (
    "nsys profile --trace=cuda,nvtx,cudnn,cublas --sample=none --cpuctxsw=none --cuda-graph-trace=node "
    f"--capture-range=nvtx --nvtx-capture=profile@{DOMAIN} --capture-range-end=stop --force-overwrite=true"
)


def nsys_command(source: str, overrides: Sequence[str], *, iterations: int, output: Path) -> list[str]:
    """Returns the command that records iterations with Nsight Systems.

    Args:
        source: a recipe's name or a file.
        overrides: ``KEY=VALUE`` each.
        iterations: the number of recorded iterations, after one to warm up.
        output: the folder of the report, ``nsys.nsys-rep``.
    """
    return [
        *_NSYS.split(),
        f"--output={output / 'nsys'}",
        *(sys.executable, "-m", "loopfast", "profile", f"--iterations={iterations}", "--no-trace"),
        *("--config", source),
        *(part for override in overrides for part in ("--set", override)),
    ]


class _Entry(NamedTuple):
    name: str
    called: bool
    thread: int
    begin: float
    end: float


class _Busy:
    """The union of time intervals."""

    def __init__(self, intervals: Iterable[tuple[float, float]]) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        for begin, end in sorted(intervals):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif begin < end:
                self._begins.append(begin)
                self._ends.append(end)

    def within(self, begin: float, end: float) -> float:
        """Returns the length of an interval's intersection with the union."""
        first = bisect_right(self._ends, begin)
        last = bisect_left(self._begins, end)
        return sum(
            min(end, self._ends[index]) - max(begin, self._begins[index]) for index in range(first, last)
        )


def _outside(entries: Iterable[_Entry], busy: _Busy) -> dict[str, float]:
    """Returns the time outside model calls by the name of the innermost range, from one thread's nested ranges."""
    times: dict[str, float] = defaultdict(float)
    open_: list[_Entry] = []
    since = 0.0

    def until(moment: float) -> None:
        nonlocal since
        name = open_[-1].name
        times[name] += max(0.0, moment - since - busy.within(since, moment))
        since = moment

    for entry in sorted(entries, key=lambda entry: (entry.begin, -entry.end)):
        while open_ and open_[-1].end <= entry.begin:
            until(open_[-1].end)
            open_.pop()
        if open_:
            until(entry.begin)
        since = entry.begin
        open_.append(entry)
    while open_:
        until(open_[-1].end)
        open_.pop()
    return {name: seconds for name, seconds in times.items() if seconds > 0}
