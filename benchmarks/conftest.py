from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

import loopfast_kernels

from .cases import OPS, SHAPES, Case, device, make_inputs
from .competitors import MissingCompetitorError, runner
from .counting import kernel_launches, peak_extra_bytes
from .machine import device_name
from .timing import Playback, copy_bandwidth, durations, settle_heap

BUDGET_SECONDS = 0.7


def _backend(where: torch.device) -> str:
    info = loopfast_kernels.info()
    served = info[where.type] if info["requested"] == "by device" else info["requested"]
    return served.partition(" ")[0]


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """What every result was measured on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    where = device()
    settle_heap()
    return {
        "device": device_name(where),
        "copy_gb_per_s": copy_bandwidth(where) / 1e9,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "loopfast": loopfast_kernels.__version__,
    }


@pytest.fixture
def playback(request: pytest.FixtureRequest) -> Playback:
    """The clock of the `benchmark` fixture; it must be asked for before that."""
    clock = Playback()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return clock


@pytest.fixture
def measure(playback: Playback, benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``measure(case)`` times a case and describes it in ``extra_info``."""

    def measure(case: Case, budget: float = BUDGET_SECONDS) -> None:
        try:
            run = runner(case.op, case.competitor)
        except MissingCompetitorError as error:
            pytest.skip(str(error))
        op, where = OPS[case.op], device()

        def make(seed: int) -> Any:
            shape = SHAPES[case.shape]
            return make_inputs(shape, case.rows, case.dtype, where, requires_grad=op.backward, seed=seed)

        inputs = [make(0)]
        moved = op.bytes(inputs[0])
        if benchmark.disabled:
            benchmark.pedantic(run, inputs)
            return
        machine = request.getfixturevalue("machine")
        if where.type == "cuda":
            # Inputs in turn, together too large to be found in the cache.
            cache = torch.cuda.get_device_properties(where).L2_cache_size
            inputs += [make(seed) for seed in range(1, min(math.ceil(3 * cache / moved), 2048))]
        torch.manual_seed(0)
        seconds = durations(run, inputs, where, budget)
        playback.load(seconds)
        benchmark.group = f"{case.op} {case.setting}"
        benchmark.name = case.competitor
        benchmark.pedantic(lambda: None, rounds=len(seconds))
        rate = moved / benchmark.stats.stats.median
        benchmark.extra_info |= machine | {
            "op": case.op,
            "setting": case.setting,
            "competitor": case.competitor,
            "backend": _backend(where) if case.competitor == "ours" else None,
            "bytes": moved,
            "gb_per_s": rate / 1e9,
            "copy_share": rate / 1e9 / machine["copy_gb_per_s"],
            "launches": kernel_launches(lambda: run(inputs[0])) if where.type == "cuda" else None,
            "peak_bytes": peak_extra_bytes(lambda: run(inputs[0]), where),
        }

    return measure
