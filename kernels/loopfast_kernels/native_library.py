"""The native library (C++), reached through its C interface by ctypes.

It is compiled without Python and torch, so one build serves every version of both. Its work runs on torch's own
threads.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .transition import Transition

FILE_NAME = "libloopfast.so"

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_REDUCTIONS = {"mean": 0, "sum": 1}


class Latents(Structure):
    """``loopfast_input`` and ``loopfast_output``."""

    _fields_ = (("data", c_void_p), ("dtype", c_int32))


class TransitionStruct(Structure):
    """``loopfast_transition``."""

    _fields_ = (
        ("rows", c_int64),
        ("elements", c_int64),
        ("steps", c_int64),
        ("table", c_void_p),
        ("step", c_void_p),
        ("step_stride", c_int64),
        ("model_output", Latents),
        ("uncond_output", Latents),
        ("sample", Latents),
        ("guidance_scale", c_float),
        ("reduction", c_int32),
        ("threads", c_int32),
    )
    float32_table: Tensor  # lives as long as its address is in use


class LossArguments(Structure):
    """``loopfast_loss_arguments``."""

    _fields_ = (
        ("prev_sample", Latents),
        ("old_logprob", c_void_p),
        ("advantage", c_void_p),
        ("rewards", c_void_p),
        ("groups", c_int64),
        ("samples", c_int64),
        ("trajectory", c_void_p),
        ("advantage_scale", c_float),
        ("advantage_clip", c_float),
        ("clip_range", c_float),
        ("reference_output", Latents),
        ("kl_weight", c_float),
    )


class LossResults(Structure):
    """``loopfast_loss_results``."""

    _fields_ = (
        ("loss", c_void_p),
        ("logprob", c_void_p),
        ("ratio", c_void_p),
        ("advantage", c_void_p),
        ("clipped", c_void_p),
        ("kl", c_void_p),
        ("grad_output", Latents),
        ("grad_uncond", Latents),
        ("grad_scale", c_void_p),
    )


class Norm(Structure):
    """``loopfast_norm``."""

    _fields_ = (
        ("rows", c_int64),
        ("channels", c_int64),
        ("pixels", c_int64),
        ("groups", c_int64),
        ("channels_last", c_int32),
        ("eps", c_float),
        ("x", Latents),
        ("weight", Latents),
        ("bias", Latents),
        ("shift", Latents),
        ("threads", c_int32),
    )


_SIGNATURES = {
    "loopfast_denoise_step": (POINTER(TransitionStruct), c_void_p, Latents, Latents, c_int64, c_void_p),
    "loopfast_transition_logprob": (POINTER(TransitionStruct), Latents, c_void_p),
    "loopfast_transition_logprob_backward": (POINTER(TransitionStruct), Latents, c_void_p, Latents, Latents),
    "loopfast_loss": (POINTER(TransitionStruct), POINTER(LossArguments), POINTER(LossResults)),
    "loopfast_scale_gradients": (c_int64, c_int64, Latents, Latents, c_void_p, c_float, c_int32),
    "loopfast_leave_one_out": (c_void_p, c_int64, c_int64, c_void_p),
    "loopfast_group_norm_silu": (POINTER(Norm), Latents, c_void_p),
    "loopfast_group_norm_silu_backward": (POINTER(Norm), c_void_p, *[Latents] * 5),
    "loopfast_philox_normal": (c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int32),
    "loopfast_philox_4x32": (c_void_p, c_void_p, c_void_p),
}


@cache
def load() -> ctypes.CDLL:
    """Loads the library installed beside this package.

    Raises:
        FileNotFoundError: the package was installed without it, or runs from a source tree.
        OSError: the file exists but cannot be loaded (built for another machine, damaged).
    """
    # An editable install keeps the library and the sources in different folders of one package.
    for folder in sys.modules[__package__].__path__:
        path = Path(folder) / FILE_NAME
        if path.is_file():
            library = ctypes.CDLL(str(path))
            for name in ("loopfast_version", "loopfast_cpu_features", "loopfast_isa", "loopfast_error"):
                getattr(library, name).restype = ctypes.c_char_p
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
            _lend_threads(library)
            return library
    raise FileNotFoundError(FILE_NAME)


def _lend_threads(library: ctypes.CDLL) -> None:
    """Lets the library work on torch's threads: ``torch_parallel_for`` has the type it asks for."""
    # The function belongs to torch's stable C interface, in the library that torch has loaded already.
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.loopfast_set_parallel_for(ctypes.cast(torch_library.torch_parallel_for, c_void_p))


def missing() -> str | None:
    """Returns why there is no library, or None where there is one."""
    try:
        load()
    except FileNotFoundError:
        return "it was not built (no compiler, LOOPFAST_NATIVE=0, or a source tree that was not installed)"
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded: {error}"
    return None


def describe() -> str:
    """Returns the library's version and the instruction set it runs in."""
    library = load()
    return f"{library.loopfast_version().decode()} ({library.loopfast_isa().decode()})"


def call(function: str, *arguments: object) -> None:
    """Calls a function of the C interface.

    Raises:
        ValueError: an argument is wrong; the message names it.
        MemoryError: it ran out of memory.
    """
    library = load()
    status = getattr(library, function)(*arguments)
    if status:
        message = library.loopfast_error().decode()
        raise MemoryError(message) if status == 2 else ValueError(message)


def pointer(name: str, tensor: Tensor | None) -> int | None:
    """Returns the address of a tensor's elements, or None for None.

    Raises:
        ValueError: the elements are not contiguous.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return tensor.data_ptr()


def latents(name: str, tensor: Tensor | None) -> Latents:
    """Returns latents by address and dtype; None and an empty tensor are latents that are not given."""
    if tensor is None or tensor.numel() == 0:
        return Latents(None, 0)
    return Latents(pointer(name, tensor), _DTYPES[tensor.dtype])


def image(name: str, tensor: Tensor) -> Latents:
    """Returns an image ``[N, C, H, W]`` by address and dtype, in the memory format it has.

    Raises:
        ValueError: it is neither contiguous nor channels last.
    """
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return Latents(tensor.data_ptr(), _DTYPES[tensor.dtype])
    return latents(name, tensor)


def as_float32(tensor: Tensor) -> Tensor:
    """Returns a tensor of coefficients or of one value per row in the dtype of the arithmetic."""
    return tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32)


def transition_struct(transition: Transition, reduction: str) -> TransitionStruct:
    """Returns a transition as the C interface takes it; the transition's tensors must outlive the call."""
    output = transition.model_output
    rows = output.shape[0]
    table = as_float32(transition.table)
    struct = TransitionStruct(
        rows=rows,
        elements=output.numel() // rows,
        steps=table.shape[0],
        table=pointer("table", table),
        step=pointer("step", transition.step),
        step_stride=1,
        model_output=latents("model_output", output),
        uncond_output=latents("uncond_output", transition.uncond_output),
        sample=latents("sample", transition.sample),
        guidance_scale=transition.guidance_scale,
        reduction=_REDUCTIONS[reduction],
        threads=torch.get_num_threads(),
    )
    struct.float32_table = table
    return struct
