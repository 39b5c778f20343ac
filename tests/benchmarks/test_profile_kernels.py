"""The kernels of a profile, from events as torch's profiler makes them on a GPU."""

from __future__ import annotations

from itertools import count

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

# kernels are known by what is loaded
import loopfast_kernels.denoise_step.triton_kernels
import loopfast_kernels.loop_loss.triton_kernels  # noqa: F401
from loopfast.planning.profile import Row, _rows

MAIN, AUTOGRAD, UNKNOWN = 1, 2, 99
HOME, SIDE, BRANCH = 7, 21, 13


class Trace:
    """Events of a run on a GPU, times in microseconds."""

    def __init__(self) -> None:
        self.events: list[FunctionEvent] = []
        self._ids = count(1)

    def host(
        self, name: str, start: float, end: float, thread: int = MAIN, number: int | None = None
    ) -> None:
        """An operator, a range, or with a ``number`` a call of CUDA."""
        number = next(self._ids) if number is None else number
        self.events.append(FunctionEvent(number, name, thread, start, end, use_device="cuda"))

    def kernel(self, name: str, start: float, end: float, number: int, stream: int = HOME) -> None:
        """A kernel that the call of CUDA of the same number has launched."""
        self.events.append(
            FunctionEvent(
                number,
                name,
                0,
                start,
                end,
                use_device="cuda",
                device_type=DeviceType.CUDA,
                device_resource_id=stream,
            )
        )

    def annotation(self, name: str, start: float, end: float) -> None:
        """A range as it is shown on the GPU."""
        self.kernel(name, start, end, 0)
        self.events[-1].is_user_annotation = True

    def rows(self, iterations: int = 1) -> dict[tuple[str, str], Row]:
        """What is counted, by name and group."""
        events = EventList(self.events, use_device="cuda")
        events._build_tree()
        return {(row.name, row.group): row for row in _rows(events, iterations) if row.kind == "kernel"}


@pytest.fixture
def trace() -> Trace:
    """A replay of a recorded step, a loss and its backward pass, beside a reward in a thread of its own."""
    trace = Trace()
    trace.host("loopfast/rollout/denoiser", 0, 10)
    # the launch of a graph belongs to no operator, and its kernels come after the range has ended
    trace.host("cudaGraphLaunch", 2, 4, UNKNOWN, number=5)
    trace.annotation("loopfast/rollout/denoiser", 20, 100)
    trace.kernel("gemm", 20, 60, 5)
    trace.kernel("gemm", 60, 90, 5, BRANCH)
    trace.kernel("denoise_step_in_place_kernel", 90, 100, 5)
    # numbers of operators and of calls of CUDA are two things
    trace.host("aten::add", 50, 52, number=5)
    trace.host("cudaLaunchKernel", 50.5, 51.5, number=6)
    trace.kernel("add", 100, 101, 6)
    trace.host("loopfast/replay/loss", 60, 70)
    trace.host("loopfast::loop_loss", 61, 69)
    trace.host("cuLaunchKernel", 62, 63, number=7)
    trace.kernel("loss_kernel", 101, 111, 7)
    trace.host("cudaMemsetAsync", 64, 65, number=8)
    trace.kernel("Memset (Device)", 111, 112, 8)
    trace.host("loopfast/replay/backward", 80, 90)
    trace.host("ConvolutionBackward0", 81, 85, AUTOGRAD)
    trace.host("cudaLaunchKernel", 82, 83, AUTOGRAD, number=9)
    trace.kernel("dgrad", 112, 130, 9)
    # a library that is called past torch's operators
    trace.host("loopfast/optimizer/optimizer", 130, 140)
    trace.host("cudaLaunchKernel", 132, 133, UNKNOWN, number=10)
    trace.kernel("kOptimizer", 141, 150, 10)
    # a reward: its thread's operators are not seen
    trace.host("cudaLaunchKernel", 3, 3.5, UNKNOWN, number=11)
    trace.kernel("vit", 25, 75, 11, SIDE)
    return trace


def test_every_kernel_is_counted_where_it_was_launched(trace: Trace) -> None:
    rows = trace.rows()
    assert {key: (row.calls, row.milliseconds) for key, row in rows.items()} == {
        ("gemm", "denoiser"): (2, pytest.approx(0.07)),
        ("denoise_step_in_place_kernel", "loopfast ops"): (1, pytest.approx(0.01)),
        ("add", "the rest"): (1, pytest.approx(0.001)),
        ("loss_kernel", "loopfast ops"): (1, pytest.approx(0.01)),
        ("Memset (Device)", "loopfast ops"): (1, pytest.approx(0.001)),
        ("dgrad", "denoiser"): (1, pytest.approx(0.018)),
        ("kOptimizer", "optimizer"): (1, pytest.approx(0.009)),
        ("vit", "other threads"): (1, pytest.approx(0.05)),
    }


def test_a_kernel_whose_launch_was_not_recorded_is_counted_by_its_time() -> None:
    trace = Trace()
    trace.host("loopfast/rollout/denoiser", 0, 100)
    trace.kernel("gemm", 20, 60, 77)
    assert trace.rows(2)["gemm", "denoiser"] == Row("gemm", "denoiser", "kernel", 0.5, pytest.approx(0.02))
