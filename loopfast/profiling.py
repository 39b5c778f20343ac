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
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

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


# a tool is attached when the process starts or never
_nsight = isinstance(nvtx.get_domain(DOMAIN), nvtx.Domain)


def range_(name: str, category: Category, payload: int | None = None) -> AbstractContextManager[object]:
    """Context that marks code for profilers.

    Args:
        name: the name of the range; a constant, since profilers keep every name.
        category: the phase of the iteration.
        payload: a number that distinguishes ranges of one name, such as the denoising step.
    """
    meter = _current if _current is not None and _current.detailed else None
    return _marked(name, category, payload, meter, None if meter is None else meter.device, False)


def model_call(
    name: str, category: Category, payload: int | None = None, device: torch.device | None = None
) -> AbstractContextManager[object]:
    """Context that marks a model call like `range_`, and adds its time to the model time of the current meter.

    Args:
        name, category, payload: as for `range_`. ``denoiser`` is the name of its forward calls, which are counted.
        device: the device whose time is measured. The capture of a CUDA graph does not count, but its replays do. None
            measures the host's time, which is right for calls that wait for their result.
    """
    return _marked(name, category, payload, _current, device, True)


def _marked(
    name: str,
    category: str,
    payload: int | None,
    meter: Meter | None,
    device: torch.device | None,
    called: bool,
) -> AbstractContextManager[object]:
    if meter is not None and _capturing(device):
        meter = None
    if meter is None and not _profiled() and not _nsight:
        return _NOTHING
    return _Range(name, category, payload, meter, device, called)


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
    annotation: Any = None
    record: Any = None
    begin: Mark | None = None

    def __enter__(self) -> None:
        if _nsight:
            self.annotation = nvtx.annotate(self.name, None, DOMAIN, self.category, self.payload or 0)
            self.annotation.__enter__()
        if _profiled():
            name = f"{DOMAIN}/{self.category}/{self.name}"
            self.record = torch.profiler.record_function(name, str(self.payload))
            self.record.__enter__()
        if self.meter is not None:
            self.begin = self.meter.mark(self.device)

    def __exit__(self, *error: Any) -> None:
        if self.begin is not None and self.meter is not None:
            self.meter.add(self.name, self.called, self.begin, self.meter.mark(self.device))
        if self.record is not None:
            self.record.__exit__(*error)
        if self.annotation is not None:
            self.annotation.__exit__(*error)


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
        begin, last = self._seconds(self._switches[0][0]), self._seconds(end)
        entries = [
            _Entry(name, called, thread, max(begin, self._seconds(start)), min(last, self._seconds(finish)))
            for name, called, thread, start, finish in self._entries
        ]
        # every moment at which a phase, a range or a call begins or ends; the longest of a moment first
        events: list[tuple[float, float, _Entry | str]] = [
            (self._seconds(mark), 0.0, name) for mark, name in self._switches
        ]
        events += [
            (moment, -entry.end, entry)
            for entry in entries
            if entry.begin < entry.end
            for moment in (entry.begin, entry.end)
        ]
        phases: dict[str, float] = defaultdict(float)
        inside: dict[str, float] = defaultdict(float)
        ranges: dict[str, float] = defaultdict(float)
        running: list[_Entry] = []
        now, current = begin, ""
        for moment, _, event in (*sorted(events, key=itemgetter(0, 1)), (last, 0.0, "")):
            passed, now = moment - now, moment
            phases[current] += passed
            in_call = any(entry.called for entry in running)
            inside[current] += passed if in_call else 0.0
            own = [entry.name for entry in running if entry.thread == self._thread]
            if own and passed and not in_call:
                ranges[own[-1]] += passed
            if isinstance(event, str):
                current = event
            elif event in running:
                running.remove(event)
            else:
                running.append(event)
        phases.pop("")
        called: dict[str, float] = defaultdict(float)
        calls = [entry for entry in entries if entry.called]
        for entry in calls:
            called[entry.name] += entry.end - entry.begin
        counts = Counter(entry.name for entry in calls)
        return Times(last - begin, dict(phases), dict(inside), dict(counts), dict(called), dict(ranges))

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


@dataclass(eq=False)
class _Entry:
    name: str
    called: bool
    thread: int
    begin: float
    end: float
