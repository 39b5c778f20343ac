"""Checks of arguments, shared by the ops.

Types, dtypes, shapes and devices are checked where an op is called. These checks do not synchronize with the
device, and they work under `torch.compile`. The values inside a tensor are checked where an op runs, and only on
the CPU: to look at them on a GPU would stall the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REAL_DTYPES = (torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum")


def check_tensor(
    name: str,
    value: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
    channels_last: bool = False,
) -> None:
    """Checks one tensor argument.

    Raises:
        TypeError: `value` is not a tensor, or has none of `dtypes`.
        ValueError: its shape or device is not the one given, or its layout is not contiguous (with
            `channels_last`: neither contiguous nor channels last).
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, the model output on {device}")
    if not value.is_contiguous():
        if channels_last and value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
            return
        layout = "contiguous or channels last" if channels_last else "contiguous"
        raise ValueError(
            f"{name} must be {layout}, got strides {list(value.stride())} for shape {list(value.shape)}"
        )


def check_transition(
    model_output: Tensor,
    latents: dict[str, Tensor | None],
    table: Tensor,
    step: Tensor | None,
    guidance_scale: float,
    reduction: str,
) -> None:
    """Checks the arguments that every op on transitions takes.

    Args:
        model_output: ``[N, *L]``.
        latents: the other arguments of that shape and device, by name; None where an optional one was not given.
        table: ``[T, 3]``.
        step: int64 ``[N]``, or None if it is checked elsewhere.
        guidance_scale: a value other than 1 needs ``uncond_output`` among `latents`.
        reduction: one of `REDUCTIONS`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
    """
    check_tensor("model_output", model_output, dtypes=LATENT_DTYPES)
    if model_output.dim() < 2 or model_output.numel() == 0:
        raise ValueError(
            f"model_output must have shape [N, ...] with elements in it, got {list(model_output.shape)}"
        )
    shape, device = model_output.shape, model_output.device
    for name, value in latents.items():
        if value is not None:
            check_tensor(name, value, dtypes=LATENT_DTYPES, shape=shape, device=device)
    check_tensor("table", table, dtypes=REAL_DTYPES, device=device)
    if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] != 3:
        raise ValueError(f"table must have shape [T, 3], got {list(table.shape)}")
    if step is not None:
        check_tensor("step", step, dtypes=(torch.int64,), shape=shape[:1], device=device)
    if guidance_scale != 1.0 and latents.get("uncond_output") is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs uncond_output")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_index(name: str, index: Tensor, size: int) -> None:
    """Checks that a CPU tensor of indices lies in ``[0, size)``; does nothing on other devices.

    Raises:
        ValueError: an index lies outside.
    """
    if index.device.type != "cpu":
        return
    wrong = index[(index < 0) | (index >= size)]
    if wrong.numel():
        raise ValueError(f"{name} must lie in [0, {size}), got {int(wrong[0])}")


def check_table(table: Tensor) -> None:
    """Checks that no sigma of a transition table on the CPU is negative or NaN; does nothing on other devices.

    Raises:
        ValueError: a sigma is negative or NaN.
    """
    if table.device.type != "cpu":
        return
    wrong = torch.nonzero(~(table[:, 2] >= 0))
    if wrong.numel():
        step = int(wrong[0])
        raise ValueError(f"table has sigma {float(table[step, 2]):g} at step {step}: it must not be negative")
