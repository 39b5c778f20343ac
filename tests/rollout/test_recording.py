"""Recordings of work in a CUDA graph, and the state after one that fails; with a fake of CUDA."""

from __future__ import annotations

import warnings

import pytest
import torch

from loopfast.rollout.recording import WARM_UP, CannotRecordError, Recorder
from loopfast.system.memory import free_cached_memory
from tests.rollout.fake_cuda import FakeCuda

DEVICE = torch.device("cuda", 0)


def nothing() -> None:
    pass


def test_work_warms_up_in_the_recordings_own_stream_before_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, calls = FakeCuda(monkeypatch), list[str]()
    Recorder(DEVICE).record(
        lambda: calls.append("rewind"), lambda: calls.append("recorded" if cuda.capturing else "warm-up")
    )
    assert calls == ["rewind", "warm-up"] * WARM_UP + ["recorded"]
    assert cuda.modes == ["warn", 0]


def test_recordings_share_one_stream_and_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = Recorder(DEVICE)
    for _ in range(3):
        recorder.record(nothing, nothing)
    assert len(cuda.streams) == 1
    assert len(cuda.recorded) == 3
    assert len(set(cuda.recorded)) == 1
    recorder.renew_pool()
    recorder.record(nothing, nothing)
    assert len(set(cuda.recorded)) == 2
    assert len(cuda.streams) == 1


def test_work_that_waits_for_the_gpu_is_not_recorded_and_the_place_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, recorded = FakeCuda(monkeypatch), list[bool]()

    def work() -> None:
        recorded.append(cuda.capturing)
        cuda.wait()

    with pytest.raises(CannotRecordError, match=r"^it waits for the GPU at .*test_recording\.py:\d+$"):
        Recorder(DEVICE).record(nothing, work)
    assert recorded == [False] * WARM_UP
    assert cuda.modes == ["warn", 0]


def test_other_warnings_of_the_work_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    with pytest.warns(UserWarning, match="a model's own"):
        Recorder(DEVICE).record(nothing, lambda: warnings.warn("a model's own", stacklevel=1))


@pytest.mark.parametrize("ends_by_itself", [False, True], ids=["torch 2.11", "torch 2.13"])
def test_a_recording_that_fails_leaves_the_process_sound(
    monkeypatch: pytest.MonkeyPatch, ends_by_itself: bool
) -> None:
    cuda = FakeCuda(monkeypatch, ends_by_itself=ends_by_itself)
    recorder = Recorder(DEVICE)

    def work() -> None:
        if cuda.capturing:
            cuda.wait()

    with pytest.raises(CannotRecordError) as caught:
        recorder.record(nothing, work)
    # the error that broke the recording, not the one that its end raised
    assert str(caught.value) == "RuntimeError: CUDA error: operation not permitted when stream is capturing"
    torch.cuda.empty_cache()
    assert len(cuda.released) == (0 if ends_by_itself else 1)
    assert cuda.fresh_generators == 1
    recorder.record(nothing, nothing)
    assert cuda.recorded
    assert not cuda.underway
    free_cached_memory()


def test_running_out_of_memory_in_a_recording_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def work() -> None:
        if cuda.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        Recorder(DEVICE).record(nothing, work)
    assert not cuda.underway


def test_a_device_without_graphs_is_told_so() -> None:
    with pytest.raises(CannotRecordError):
        Recorder(torch.device("cpu")).record(nothing, nothing)
