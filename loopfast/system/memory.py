"""Memory of the device: its use, out-of-memory errors, cached memory, and copies that do not wait."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress

import torch
from torch import Tensor

from loopfast.errors import first_line

# Libraries below PyTorch allocate memory themselves, and report that they cannot in a RuntimeError.
_LIBRARY_MESSAGES = (
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cublasCreate, without memory for its handle
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "unable to find an engine",  # cuDNN, if no algorithm's workspace fits
    "Failed to CUDA calloc",  # NCCL
    "Cuda failure 'out of memory'",  # NCCL
    "Cuda failure 2 'out of memory'",  # NCCL
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether PyTorch's allocator, CUDA, cuBLAS, cuDNN or NCCL reports that a GPU is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return any(message in text for message in _LIBRARY_MESSAGES)


def first_sentence(error: BaseException) -> str:
    """Returns the first sentence of an error's text: PyTorch's message continues with advice."""
    return first_line(error).split(". ")[0].rstrip(".")


def free_cached_memory() -> None:
    """Returns the unused memory of PyTorch's allocator to the GPUs. It never raises."""
    if torch.cuda.is_initialized():
        # the allocator refuses during the graph capture of another thread, or after one that failed
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copies a tensor to a device, and to a type if given. The host does not wait for a copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")


def memory_used(device: torch.device) -> dict[str, int]:
    """Returns the memory of this process in bytes, by the names of `loopfast.run.tracking.METRICS`.

    On a CUDA device torch's tensors are a part of the memory that its allocator has reserved, and that is a part of
    the memory in use. The rest is the CUDA context, workspaces of libraries, NCCL's buffers, and other processes. On a
    CPU there is only the peak of the whole process.
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
