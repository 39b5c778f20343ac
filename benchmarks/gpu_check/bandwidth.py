"""The ops at a few sizes: time of a call on the device and on the host, against eager torch and torch.compile.

``--once`` calls each of our ops once and measures nothing, for an external profiler.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.cases import OPS, SHAPES, Case, Inputs, make_inputs
from benchmarks.competitors import Run, runner
from benchmarks.timing import copy_bandwidth, durations, settle_heap

from .options import Options, parse
from .record import Record, first_line

_OPS = ("loop_loss", "denoise_step_guided", "transition_logprob")
_BUDGET_SECONDS = 0.25

# Consecutive calls for measuring the host's time: fewer than the device's queue holds.
_HOST_CALLS = 50


def main() -> int:
    """Measures, with a line for each case; the exit status is 1 if a case could not be measured."""
    options = parse(__doc__, "--once")
    torch.manual_seed(0)
    if options.once:
        for case in cases(options):
            if case.competitor == "ours":
                runner(case.op, "ours")(_inputs(case, options, 1)[0])
        return 0
    record = Record.from_environment("bandwidth")
    settle_heap()
    copy = copy_bandwidth(options.device, 64 if options.small else 1024)
    record.write("copy", gb_per_s=copy / 1e9)
    failed = False
    for case in cases(options):
        what = {"op": case.op, "setting": case.setting, "competitor": case.competitor}
        try:
            record.write("call", **what, **_measure(case, options, copy))
        except Exception as error:
            failed = True
            record.write("call", **what, error=first_line(error))
    return int(failed)


def cases(options: Options) -> Iterator[Case]:
    """Returns the cases, the most important ones first; compiled ones take longest and come last."""
    if options.small:
        for competitor in ("ours", "eager", "compile"):
            yield Case("transition_logprob", "SD", 4, torch.float32, competitor)
        return
    sizes = (("SD", 16), ("SD3", 16), ("SD", 64), ("SD", 256))
    dtypes = (torch.bfloat16, torch.float32)
    for competitor, (shape, rows), dtype, op in itertools.product(("ours", "eager"), sizes, dtypes, _OPS):
        yield Case(op, shape, rows, dtype, competitor)
    for (shape, rows), op in itertools.product(sizes[:2], _OPS):
        yield Case(op, shape, rows, torch.bfloat16, "compile")


def _inputs(case: Case, options: Options, count: int) -> list[Inputs]:
    shape, grads = SHAPES[case.shape], OPS[case.op].backward
    return [
        make_inputs(shape, case.rows, case.dtype, options.device, requires_grad=grads, seed=seed)
        for seed in range(count)
    ]


def _measure(case: Case, options: Options, copy: float) -> dict[str, Any]:
    run = runner(case.op, case.competitor)
    inputs = _inputs(case, options, 1)
    moved = OPS[case.op].bytes(inputs[0])
    if options.device.type == "cuda":
        # inputs in turn, together too large for the cache
        cache = torch.cuda.get_device_properties(options.device).L2_cache_size
        inputs = _inputs(case, options, min(math.ceil(2 * cache / moved), 48) + 1)
    began = time.perf_counter()
    run(inputs[0])
    _wait(options)
    first = time.perf_counter() - began
    seconds = median(durations(run, inputs, options.device, _BUDGET_SECONDS))
    return {
        "us": 1e6 * seconds,
        "host_us": 1e6 * _host_seconds(run, inputs, options),
        "bytes": moved,
        "gb_per_s": moved / seconds / 1e9,
        "copy_share": moved / seconds / copy,
        "first_call_s": first,
    }


def _host_seconds(run: Run, inputs: Sequence[Inputs], options: Options) -> float:
    """Returns the seconds that Python needs to start a call, while the device may still be busy."""
    if options.device.type == "cpu":
        return math.nan  # the host is the device
    _wait(options)
    began = time.perf_counter()
    for index in range(_HOST_CALLS):
        run(inputs[index % len(inputs)])
    seconds = (time.perf_counter() - began) / _HOST_CALLS
    _wait(options)
    return seconds


def _wait(options: Options) -> None:
    wait: Callable[[], None] = torch.cuda.synchronize if options.device.type == "cuda" else lambda: None
    wait()


if __name__ == "__main__":
    sys.exit(main())
