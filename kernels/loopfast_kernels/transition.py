"""The arguments that the ops on transitions share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Transition(NamedTuple):
    """A step of the sampler for N rows: ``x_{t-1} ~ N(a x_t + b m, sigma^2)`` with ``m = u + g (c - u)``.

    Python's backends and the Triton kernels both receive it; the schemas of torch's operators are flat.

    Attributes:
        model_output: ``[N, *L]``, the conditional output ``c``.
        sample: ``[N, *L]``, ``x_t``; for the op in place the store ``[T + 1, N, *L]``.
        table: ``[T, 3]``, columns a, b, sigma of every step.
        step: int64 ``[N]``, the row of `table` each sample is at; for the op in place ``[1]``.
        uncond_output: ``[N, *L]``, the unconditional output ``u``, or None.
        guidance_scale: ``g``.
    """

    model_output: Tensor
    sample: Tensor
    table: Tensor
    step: Tensor
    uncond_output: Tensor | None
    guidance_scale: float
