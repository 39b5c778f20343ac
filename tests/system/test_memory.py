"""What counts as running out of a GPU's memory, and giving it back."""

from __future__ import annotations

import pytest
import torch

from loopfast.system.memory import free_cached_memory, is_out_of_memory, to_device


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nFailed to CUDA calloc async 608 bytes"),
    ],
)
def test_every_library_runs_out_of_memory_in_its_own_words(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA out of memory"),
        MemoryError(),
    ],
)
def test_other_errors_are_none_of_a_gpus_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_giving_memory_back_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken() -> None:
        calls.append(1)
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    free_cached_memory()
    assert calls


def test_a_copy_to_a_device_has_the_values_and_the_type() -> None:
    moved = to_device(torch.tensor([1, 2, 3]), torch.device("cpu"), torch.float64)
    assert moved.dtype == torch.float64
    assert moved.tolist() == [1, 2, 3]


@pytest.mark.gpu
def test_a_copy_to_a_gpu_does_not_wait() -> None:
    there, device = torch.arange(1000), torch.device("cuda")
    to_device(there, device)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(there, device)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(moved.cpu(), there)
