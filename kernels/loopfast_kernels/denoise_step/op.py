"""Registration of ``loopfast::denoise_step`` and its in-place form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..registration import Operator, select
from ..transition import Transition
from ..transition_logprob.reference import arithmetic_dtype
from ..validation import LATENT_DTYPES, REAL_DTYPES, check_tensor, check_transition

_NEW_SAMPLE = backends.Implementations(__package__, "denoise_step")
_IN_PLACE = backends.Implementations(__package__, "denoise_step_")


def _new_sample(arguments: Any) -> tuple[Tensor, Tensor]:
    compute = _NEW_SAMPLE.choose(arguments.model_output, arguments.sample, arguments.uncond_output)
    result: tuple[Tensor, Tensor] = compute(
        select(Transition, arguments), arguments.seed, arguments.reduction
    )
    return result


def _in_place(arguments: Any) -> None:
    output, trajectory, logprob = arguments.model_output, arguments.trajectory, arguments.logprob
    model_input, table, step = arguments.model_input, arguments.table, arguments.step
    uncond_output = arguments.uncond_output
    compute = _IN_PLACE.choose(output, trajectory, logprob, model_input, uncond_output)
    transition = Transition(output, trajectory, table, step, uncond_output, arguments.guidance_scale)
    compute(transition, logprob, model_input, arguments.seed, arguments.reduction)
    # Autograd does not notice writes through a pointer.
    torch.autograd.graph.increment_version((trajectory, logprob, model_input, step))


def _fake(arguments: Any) -> tuple[Tensor, Tensor]:
    output, sample = arguments.model_output, arguments.sample
    logprob = output.new_empty(output.shape[0], dtype=arithmetic_dtype(output, sample))
    return torch.empty_like(sample), logprob


_denoise_step = Operator(
    "denoise_step(Tensor model_output, Tensor sample, Tensor table, Tensor step, Tensor seed, "
    "Tensor? uncond_output, float guidance_scale, str reduction) -> (Tensor, Tensor)",
    _new_sample,
    _fake,
)
_denoise_step_ = Operator(
    "denoise_step_(Tensor model_output, Tensor(a!) trajectory, Tensor(b!) logprob, Tensor(c!) model_input, "
    "Tensor(d!) step, Tensor table, Tensor seed, Tensor? uncond_output, float guidance_scale, "
    "str reduction) -> ()",
    _in_place,
    lambda _: None,
)


def denoise_step(
    model_output: Tensor,
    sample: Tensor,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Samples ``x_{t-1}`` from ``x_t`` and returns its log-probability too.

    ``x_{t-1} = a x_t + b m + sigma z`` with ``m = u + g (c - u)`` and ``z`` the noise of `philox_normal` for
    the row's seed and step. The result is rounded to the dtype of `sample`, and the log-probability is that
    of the rounded value: `transition_logprob` of the stored value gives the same number, bit for bit.

    Args:
        model_output: ``[N, *L]``, float32, float16, bfloat16 or float64; the conditional output ``c``.
        sample: ``[N, *L]``, ``x_t``.
        table: float32 (or float64) ``[T, 3]``, columns a, b, sigma of every step.
        step: int64 ``[N]``, the row of `table` each sample is at.
        seed: int64 ``[N]``, one per row.
        uncond_output: ``[N, *L]``, the unconditional output ``u``.
        guidance_scale: ``g``; a value other than 1 needs `uncond_output`.
        reduction: ``"mean"`` (over a row's elements) or ``"sum"``.

    Returns:
        ``x_{t-1}`` like `sample`, and its log-probability, float32 ``[N]`` (float64 for float64 inputs).
        Neither is differentiable: a sample is data.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or value; on the CPU also a step outside the table.
    """
    latents = {"sample": sample, "uncond_output": uncond_output}
    check_transition(model_output, latents, table, step, guidance_scale, reduction)
    check_tensor(
        "seed", seed, dtypes=(torch.int64,), shape=(model_output.shape[0],), device=model_output.device
    )
    result: tuple[Tensor, Tensor] = _denoise_step(
        model_output.detach(),
        sample.detach(),
        table,
        step,
        seed,
        None if uncond_output is None else uncond_output.detach(),
        float(guidance_scale),
        reduction,
    )
    return result


def denoise_step_(
    model_output: Tensor,
    trajectory: Tensor,
    logprob: Tensor,
    model_input: Tensor,
    step: Tensor,
    table: Tensor,
    seed: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    reduction: str = "mean",
) -> None:
    """Advances a whole batch by one step inside its trajectory store.

    It is made for loops that are captured once and replayed: `step`, on the device, says where to read and
    write, so the same launch serves every step. It reads ``trajectory[step]``, writes ``trajectory[step + 1]``,
    ``logprob[step]`` and `model_input`, and adds 1 to `step`.

    Args:
        model_output: ``[N, *L]``, the conditional output for ``trajectory[step]``.
        trajectory: ``[T + 1, N, *L]``, contiguous; written in place.
        logprob: float32 (or float64) ``[T, N]``, contiguous; written in place.
        model_input: ``[M N, *L]``, contiguous, written in place; every block of N rows receives ``x_{t-1}``
            (M is 2 where guidance evaluates both halves in one batch).
        step: int64 ``[1]``, the step all rows are at; advanced in place.
        table: float32 (or float64) ``[T, 3]``.
        seed: int64 ``[N]``.
        uncond_output: as in `denoise_step`.
        guidance_scale: as in `denoise_step`.
        reduction: as in `denoise_step`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or value; on the CPU also a step outside the table.
    """
    check_transition(model_output, {"uncond_output": uncond_output}, table, None, guidance_scale, reduction)
    rows, device = model_output.shape[:1], model_output.device
    check_tensor("step", step, dtypes=(torch.int64,), shape=(1,), device=device)
    steps = table.shape[0]
    check_tensor("seed", seed, dtypes=(torch.int64,), shape=rows, device=device)
    check_tensor(
        "trajectory", trajectory, dtypes=LATENT_DTYPES, shape=(steps + 1, *model_output.shape), device=device
    )
    check_tensor("logprob", logprob, dtypes=REAL_DTYPES, shape=(steps, *rows), device=device)
    check_tensor("model_input", model_input, dtypes=LATENT_DTYPES, device=device)
    if (
        model_input.shape[1:] != model_output.shape[1:]
        or model_input.shape[0] == 0
        or model_input.shape[0] % rows[0] != 0
    ):
        raise ValueError(
            f"model_input must have shape [M * {rows[0]}, {', '.join(map(str, model_output.shape[1:]))}], "
            f"got {list(model_input.shape)}"
        )
    _denoise_step_(
        model_output.detach(),
        trajectory,
        logprob,
        model_input,
        step,
        table,
        seed,
        None if uncond_output is None else uncond_output.detach(),
        float(guidance_scale),
        reduction,
    )
