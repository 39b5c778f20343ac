from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import loopfast_kernels
from loopfast_kernels import native_library

from .cases import OPS, Case, device
from .competitors import MissingCompetitorError, runner
from .counting import kernel_launches, peak_extra_bytes
from .machine import device_name
from .plain_process import seconds_elsewhere
from .timing import Playback, copy_bandwidth, durations, host_seconds, rotating, settle_heap

BUDGET_SECONDS = 0.7


def _backend(where: torch.device) -> str:
    info = loopfast_kernels.info()
    served = info[where.type] if info["requested"] == "by device" else info["requested"]
    return served.partition(" ")[0]


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """The machine of the measurements, for every result."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    where = device()
    settle_heap()
    name = device_name(where)
    if _backend(where) == "native":  # its speed depends on the instruction set
        name += f", {native_library.load().loopfast_isa().decode()}"
    return {
        "device": name,
        "copy_gb_per_s": copy_bandwidth(where) / 1e9,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "loopfast": loopfast_kernels.__version__,
    }


@pytest.fixture
def playback(request: pytest.FixtureRequest) -> Playback:
    """The clock of the `benchmark` fixture. It must be requested before that fixture."""
    clock = Playback()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return clock


@pytest.fixture
def time_call(playback: Playback, benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``time_call(run, make, moved, op=..., setting=..., competitor=...)`` times a call and describes it.

    ``make`` returns the argument of ``run`` for a seed, and ``moved`` the bytes that a call with it has to move.
    ``elsewhere`` times the call in another process: it returns durations for a budget in seconds.
    """

    def time_call(
        run: Callable[[Any], object],
        make: Callable[[int], Any],
        moved: Callable[[Any], int],
        *,
        op: str,
        setting: str,
        competitor: str,
        budget: float = BUDGET_SECONDS,
        elsewhere: Callable[[float], list[float]] | None = None,
    ) -> None:
        where = device()
        if benchmark.disabled:
            benchmark.pedantic(run, [make(0)])
            return
        machine = request.getfixturevalue("machine")
        inputs = rotating(make, moved, where)
        torch.manual_seed(0)
        seconds = elsewhere(budget) if elsewhere else durations(run, inputs, where, budget)
        playback.load(seconds)
        benchmark.group, benchmark.name = f"{op} {setting}", competitor
        benchmark.pedantic(lambda: None, rounds=len(seconds))
        on_gpu = where.type == "cuda"
        rate = moved(inputs[0]) / benchmark.stats.stats.median
        benchmark.extra_info |= machine | {
            "op": op,
            "setting": setting,
            "competitor": competitor,
            "backend": _backend(where) if competitor == "ours" else None,
            "bytes": moved(inputs[0]),
            "gb_per_s": rate / 1e9,
            "copy_share": rate / 1e9 / machine["copy_gb_per_s"],
            "host_us": host_seconds(run, inputs) * 1e6 if on_gpu else None,
            "launches": kernel_launches(lambda: run(inputs[0])) if on_gpu else None,
            "peak_bytes": peak_extra_bytes(lambda: run(inputs[0]), where),
        }

    return time_call


@pytest.fixture
def measure(time_call: Callable[..., None]) -> Callable[[Case], None]:
    """``measure(case)`` times a case of the ops on latents."""

    def measure(case: Case) -> None:
        try:
            run = runner(case.op, case.competitor)
        except MissingCompetitorError as error:
            pytest.skip(str(error))
        time_call(
            run,
            case.inputs,
            OPS[case.op].bytes,
            op=case.op + "_plain" * case.plain,
            setting=case.setting,
            competitor=case.competitor,
            elsewhere=partial(seconds_elsewhere, case) if case.plain else None,
        )

    return measure
