"""Memory: what is used, what counts as running out of it, giving it back, and copying into it without waiting."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress

import torch
from torch import Tensor

from loopfast.errors import first_line

# Libraries under PyTorch allocate for themselves, and say so in a plain RuntimeError.
_LIBRARY_MESSAGES = (
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cublasCreate, where there is no room for its handle
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "unable to find an engine",  # cuDNN, where no algorithm's workspace fits
    "Failed to CUDA calloc",  # NCCL
    "Cuda failure 'out of memory'",  # NCCL
    "Cuda failure 2 'out of memory'",  # NCCL
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory does not suffice: PyTorch's allocator, CUDA, cuBLAS, cuDNN or NCCL."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return any(message in text for message in _LIBRARY_MESSAGES)


def first_sentence(error: BaseException) -> str:
    """What ran out, without the advice that follows in PyTorch's message."""
    return first_line(error).split(". ")[0].rstrip(".")


def free_cached_memory() -> None:
    """Gives what PyTorch's allocator holds and does not use back to the GPUs. It never raises."""
    if torch.cuda.is_initialized():
        # with a recording of another thread under way, or after one that failed, the allocator refuses
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, in a type if given. The host does not wait for a copy from its memory to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")


def memory_used(device: torch.device) -> dict[str, int]:
    """The metrics of a process's memory in bytes, by the names of `loopfast.run.tracking.METRICS`.

    On a CUDA device torch's tensors are a part of what its allocator has reserved, which is a part of what is taken:
    beside it lie the CUDA context, workspaces of libraries, NCCL's buffers, and whatever other processes hold.
    On a CPU there is only the peak of the whole process.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_memory_bytes": total - free,
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
