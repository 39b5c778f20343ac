"""Measures the time of a configuration's iterations by part, by model call and by operator: ``loopfast profile``."""

from __future__ import annotations

import gzip
import json
import platform
import shutil
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from loopfast.config import Config
from loopfast.errors import Interrupted, short
from loopfast.profiling import DOMAIN, Times, range_
from loopfast.reporting.tables import aligned_table
from loopfast.run.console import Display
from loopfast.system.files import write_file, writing
from loopfast.system.memory import memory_used
from loopfast.training.run import Run, Stopped
from loopfast.training.setup import start
from loopfast.training.state import TrainState
from loopfast.training.train import iterate
from loopfast.version import __version__

__all__ = ["Profile", "Row", "profile"]

_GROUP_OF_CALL = {"denoiser": "denoiser", "backward": "denoiser", "decoder": "VAE", "reward": "reward"}
_OPS = "loopfast ops"
_REST = "the rest"
_ELSEWHERE = "other threads"
_BETWEEN = "(Python between operators)"
_SHOWN = 25


@dataclass(frozen=True)
class Row:
    """An operator or a kernel of a GPU, with its calls and its own milliseconds per iteration under the profiler.

    ``group`` is denoiser, VAE, reward, loopfast ops, optimizer or the rest. For kernels it may also be other threads,
    such as the one that scores images. ``kind`` is ``operator`` (time of the host) or ``kernel`` (time of the GPU).
    """

    name: str
    group: str
    kind: str
    calls: float
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """The result of `profile`.

    Attributes:
        times: the times of each iteration without torch's profiler.
        rows: operators and kernels from the iterations under the profiler, the longest first.
        facts: the run, its sizes and its device.
        files: the written files, the trace first.
    """

    times: list[Times]
    rows: list[Row]
    facts: dict[str, Any]
    files: list[Path]

    @property
    def outside_share(self) -> float:
        """The share of the time without torch's profiler in which no model call was running."""
        return 1 - sum(times.model for times in self.times) / sum(times.total for times in self.times)

    def outside(self) -> dict[str, float]:
        """Returns the seconds per iteration outside model calls, by their innermost range, the longest first."""
        sums = _sums(times.ranges for times in self.times)
        unmarked = sum(times.total - times.model for times in self.times) - sum(sums.values())
        each = {name: seconds / len(self.times) for name, seconds in {**sums, "": unmarked}.items()}
        return _longest_first(each)

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as data for JSON."""
        return {
            **self.facts,
            "outside_model_share": self.outside_share,
            "outside_seconds": self.outside(),
            "iterations": [
                {**asdict(times), "model": times.model, "outside_model_share": times.outside_share}
                for times in self.times
            ],
            "rows": [asdict(row) for row in self.rows],
        }

    def as_markdown(self) -> str:
        """Returns the result as tables."""
        count = len(self.times)
        total = sum(times.total for times in self.times) / count
        phases, inside, calls, called = (
            {key: value / count for key, value in _sums(getattr(times, name) for times in self.times).items()}
            for name in ("phases", "inside", "calls", "called")
        )
        phases["between them"] = total - sum(phases.values())
        inside["between them"] = inside.get("", 0.0)
        by_phase = [
            (name, f"{spent:.3f}", _percent(spent / total), f"{1e3 * (spent - inside.get(name, 0.0)):.1f}")
            for name, spent in phases.items()
        ]
        share = self.outside_share
        by_phase.append(("all", f"{total:.3f}", _percent(1), f"{1e3 * share * total:.1f}"))
        models = [
            (name, f"{calls[name]:g}", f"{seconds:.3f}", _percent(seconds / total))
            for name, seconds in _longest_first(called).items()
        ]
        outside = [
            (name or "in no range", f"{1e3 * seconds:.1f}", _percent(seconds / total))
            for name, seconds in self.outside().items()
        ]
        summary = f"Outside model calls: **{_percent(share)}** of an iteration of {total:.3f} s."
        sections = [
            f"# Where the time goes: {self.facts['run']}",
            "\n".join(f"* {name}: {value}" for name, value in self.facts.items() if name != "run"),
            f"## By part, without torch's profiler\n\n{summary}",
            aligned_table(("part", "seconds", "share", "of it outside model calls, ms"), by_phase),
            aligned_table(("model calls", "number", "seconds", "share"), models),
            aligned_table(("outside model calls, by range", "ms", "share"), outside),
        ]
        for kind, title in (("kernel", "By kernel, on the GPU"), ("operator", "By operator, on the host")):
            rows = [row for row in self.rows if row.kind == kind]
            whole = sum(row.milliseconds for row in rows)
            if whole == 0:
                continue
            groups = _longest_first(_sums({row.group: row.milliseconds} for row in rows))
            by_group = [(name, f"{value:.1f}", _percent(value / whole)) for name, value in groups.items()]
            by_row = []
            for row in rows[:_SHOWN]:
                # names of templated kernels have hundreds of letters
                name, own = short(row.name.replace("|", "\\|")), row.milliseconds
                by_row.append((name, row.group, f"{row.calls:g}", f"{own:.2f}", _percent(own / whole)))
            sections += [
                f"## {title}, under torch's profiler\n\nIt slows Python and small operators.",
                aligned_table(("group", "own ms", "share"), by_group),
                aligned_table((kind, "group", "calls", "own ms", "share"), by_row),
            ]
        return "\n\n".join(sections) + "\n"


def profile(
    config: Config, *, iterations: int, output: Path, trace: bool, display: Display
) -> Profile | None:
    """Runs iterations of a configuration, sampling and updates, and measures their time.

    One iteration warms up, ``iterations`` are timed, and the same number runs under torch's profiler. The run itself
    leaves nothing behind.

    Args:
        config: the run. Its folder and its trackers are not used.
        iterations: the number of iterations.
        output: the folder of ``trace.json.gz`` (for chrome://tracing or Perfetto), ``profile.json`` and ``profile.md``.
        trace: whether to time and trace. False runs the iterations after the warm-up in the NVTX range ``profile``, for
            an external profiler.
        display: shows progress and warnings.

    Returns:
        The result; None without ``trace``.

    Raises:
        LoopfastError: the run cannot start or continue, or the output cannot be written.
        Interrupted: a signal stopped it.
    """
    with tempfile.TemporaryDirectory(prefix="loopfast-profile-") as scratch:
        elsewhere = config.run.model_copy(update={"directory": scratch, "trackers": ()})
        with start(config.model_copy(update={"run": elsewhere}), None, display) as (run, state):
            try:
                _iterate(run, state, 1, "warming up")
                if not trace:
                    with range_("profile", "profile"):
                        _iterate(run, state, iterations, "profiling")
                    return None
                run.meter.detailed = True
                times = _iterate(run, state, iterations, "timing")
                run.meter.detailed = False
                activities = [torch.profiler.ProfilerActivity.CPU]
                if run.sampler.policy.device.type == "cuda":
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
                    _iterate(run, state, iterations, "tracing")
                facts = _facts(run, iterations)
            except Stopped:
                raise Interrupted("stopped; nothing was written", run.stop.exit_code) from None
            finally:
                run.close_tracker()
    if not run.world.is_main:
        return None
    files = [output / name for name in ("trace.json.gz", "profile.json", "profile.md")]
    found = Profile(times, _rows(profiler.events(), iterations), facts, files)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        _write_trace(profiler, files[0])
        write_file(files[1], json.dumps(found.as_dict(), indent=1).encode())
        write_file(files[2], found.as_markdown().encode())
    return found


def _write_trace(profiler: torch.profiler.profile, file: Path) -> None:
    """Compresses the trace in large pieces; torch's own compression by lines takes several times as long."""
    with tempfile.TemporaryDirectory(prefix="loopfast-trace-") as folder:
        plain = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(file, "wb", compresslevel=6) as packed:
            shutil.copyfileobj(source, packed, 2**20)


def _iterate(run: Run, state: TrainState, count: int, what: str) -> list[Times]:
    """Runs iterations without evaluation and checkpoint, and returns the times of each."""
    times = []
    for index in range(count):
        run.display.message(f"{what}: iteration {index + 1} of {count}")
        with range_("iteration", "profile", index):
            iterate(run, state)
        times.append(state.times)
    return times


def _facts(run: Run, iterations: int) -> dict[str, Any]:
    device = run.sampler.policy.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    config = run.config
    return {
        "run": config.run.name,
        "model": config.model.pretrained,
        "device": name,
        "dtype": config.model.dtype,
        "images": config.images_per_iteration,
        "peak memory, MiB": round(memory_used(device)["peak_memory_bytes"] / 2**20),
        "iterations timed": iterations,
        "loopfast": __version__,
        "torch": torch.__version__,
    }


def _rows(events: Iterable[FunctionEvent], iterations: int) -> list[Row]:
    """Returns the own time of operators and the time of kernels, by the ranges in which they were called."""
    everything = list(events)
    events = [event for event in everything if event.device_type.name == "CPU"]
    # the GPU's events repeat the ranges, from the first kernel to the last
    kernels = [
        event for event in everything if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    ranges = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.name.startswith(f"{DOMAIN}/")
    )
    begins = [begin for begin, _, _ in ranges]

    def around(moment: float) -> str:
        """Returns the innermost range at a moment in any thread, as a GPU's backward pass has a thread of its own."""
        for begin, end, name in reversed(ranges[: bisect_right(begins, moment)]):
            if begin <= moment <= end:
                return name
        return ""

    def group(event: FunctionEvent) -> str:
        names = (caller.name for caller in (event, *_callers(event)))
        marked = next((name for name in names if name.startswith(("loopfast::", f"{DOMAIN}/"))), None)
        if marked is None:
            marked = around(event.time_range.start)
        if marked.startswith("loopfast::"):
            return _OPS
        category, _, call = marked.partition("/")[2].partition("/")
        return _GROUP_OF_CALL.get(call) or ("optimizer" if category == "optimizer" else _REST)

    calls: dict[tuple[str, str, str], int] = defaultdict(int)
    microseconds: dict[tuple[str, str, str], float] = defaultdict(float)
    for event in events:
        key = (_BETWEEN if event.name.startswith(f"{DOMAIN}/") else event.name, group(event), "operator")
        # an operator with a gradient is dispatched to autograd, which calls one of the same name
        calls[key] += all(caller.name != event.name for caller in _callers(event))
        microseconds[key] += event.self_cpu_time_total
    # an operator's list of kernels lacks those of a CUDA graph, so each kernel is traced to the call that launched it
    launches = {event.id: event for event in events if event.name.startswith("cu")}
    streams = {
        _stream(kernel)
        for kernel in kernels
        if (launch := launches.get(kernel.id)) is not None
        # torch's profiler sees the thread if an operator or a range made the call
        and any(not caller.name.startswith("cu") for caller in _callers(launch))
    }
    ours = _own_kernels()
    for kernel in kernels:
        launch = launches.get(kernel.id, kernel)
        if kernel.name in ours:
            label = _OPS
        elif "GraphLaunch" in launch.name or _stream(kernel) in streams or not streams:
            label = group(launch)
        else:
            # torch's profiler sees the kernels of all threads, but the operators of this one only
            label = _ELSEWHERE
        calls[kernel.name, label, "kernel"] += 1
        microseconds[kernel.name, label, "kernel"] += kernel.time_range.elapsed_us()
    rows = [Row(*key, calls[key] / iterations, own / iterations / 1e3) for key, own in microseconds.items()]
    return sorted(rows, key=lambda row: -row.milliseconds)


def _callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """Yields the operators and ranges around an event, the innermost first."""
    caller: FunctionEvent | None = event.cpu_parent
    while caller is not None:
        yield caller
        caller = caller.cpu_parent


def _stream(kernel: FunctionEvent) -> tuple[int, int]:
    return kernel.device_index, kernel.device_resource_id


def _own_kernels() -> set[str]:
    """Returns the names of the ops' Triton kernels that this process has imported."""
    return {
        name
        for title, module in list(sys.modules.items())
        if title.startswith("loopfast_kernels.")
        for name in vars(module)
        if name.endswith("_kernel")
    }


def _sums(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            sums[name] += value
    return dict(sums)


def _longest_first(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
