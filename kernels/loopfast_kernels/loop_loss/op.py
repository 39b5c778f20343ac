"""Registration of ``loopfast::loop_loss`` and ``loopfast::clipped_loss``.

The gradient by the guided output is one more result of the forward pass. The backward pass scales it; nothing
else is kept for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..leave_one_out.op import check_group
from ..transition_logprob.reference import arithmetic_dtype
from ..validation import REAL_DTYPES, check_tensor, check_transition
from . import reference

_LOOP = {"reference": reference.loop_loss}
_CLIPPED = {"reference": reference.clipped_loss}

_TRANSITION = (
    "Tensor model_output, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, Tensor old_logprob"
)
_OPTIONS = (
    "float? clip_range, Tensor? uncond_output, float guidance_scale, Tensor? reference_output, "
    "float kl_weight, str reduction, bool with_grad"
)
_RESULTS = "(Tensor loss, Tensor logprob, Tensor ratio, {advantage}Tensor clipped, Tensor kl, Tensor grad)"


class LoopLoss(NamedTuple):
    """Results of `loop_loss` and `clipped_loss`; only `loss` is differentiable.

    Attributes:
        loss: ``[]``, to call ``backward()`` on.
        logprob: ``[N]``, under the current model outputs.
        ratio: ``[N]``, ``exp(logprob - old_logprob)``.
        advantage: ``[N]``, after scale and clip.
        clipped: bool ``[N]``, True where the surrogate is flat and the row gets no gradient from it.
        kl: ``[N]``, from the reference output; 0 without one.
    """

    loss: Tensor
    logprob: Tensor
    ratio: Tensor
    advantage: Tensor
    clipped: Tensor
    kl: Tensor


@torch.library.custom_op(
    "loopfast::loop_loss",
    mutates_args=(),
    schema=(
        f"({_TRANSITION}, Tensor rewards, Tensor trajectory, Tensor advantage_scale, float? advantage_clip, "
        f"{_OPTIONS}) -> {_RESULTS.format(advantage='Tensor advantage, ')}"
    ),
)
def _loop_loss(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(backends.choose(_LOOP)(*arguments))


@torch.library.custom_op(
    "loopfast::clipped_loss",
    mutates_args=(),
    schema=f"({_TRANSITION}, Tensor advantage, {_OPTIONS}) -> {_RESULTS.format(advantage='')}",
)
def _clipped_loss(*arguments: Any) -> tuple[Tensor, ...]:
    result = backends.choose(_CLIPPED)(*arguments)
    return result.loss, result.logprob, result.ratio, result.clipped, result.kl, result.grad


def _fake_results(model_output: Tensor, sample: Tensor, with_grad: bool) -> reference.LossAndGradient:
    def rows(dtype: torch.dtype) -> Tensor:
        return model_output.new_empty(model_output.shape[0], dtype=dtype)

    dtype = arithmetic_dtype(model_output, sample)
    return reference.LossAndGradient(
        loss=model_output.new_empty((), dtype=dtype),
        logprob=rows(dtype),
        ratio=rows(dtype),
        advantage=rows(dtype),
        clipped=rows(torch.bool),
        kl=rows(dtype),
        grad=model_output.new_empty(
            model_output.shape if with_grad else (0,), dtype=reference.gradient_dtype(model_output)
        ),
    )


@_loop_loss.register_fake
def _(model_output: Tensor, sample: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_results(model_output, sample, with_grad=rest[-1]))


@_clipped_loss.register_fake
def _(model_output: Tensor, sample: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    fake = _fake_results(model_output, sample, with_grad=rest[-1])
    return fake.loss, fake.logprob, fake.ratio, fake.clipped, fake.kl, fake.grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    uncond_output, guidance_scale = inputs[-6:-4]
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.inputs = len(inputs)
    ctx.dtype = inputs[0].dtype
    ctx.uncond_dtype = None if uncond_output is None else uncond_output.dtype
    ctx.guidance_scale = guidance_scale


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * ctx.inputs
    if ctx.uncond_dtype is None:
        grads[0] = (grad * grad_loss).to(ctx.dtype)
    else:
        grads[0] = (grad * (grad_loss * ctx.guidance_scale)).to(ctx.dtype)
        grads[-6] = (grad * (grad_loss * (1.0 - ctx.guidance_scale))).to(ctx.uncond_dtype)
    return tuple(grads)


_loop_loss.register_autograd(_backward, setup_context=_setup_context)
_clipped_loss.register_autograd(_backward, setup_context=_setup_context)


def _check_options(clip_range: float | None, reference_output: Tensor | None, kl_weight: float) -> None:
    if clip_range is not None and not 0.0 < clip_range < 1.0:
        raise ValueError(f"clip_range must lie between 0 and 1, or be None, got {clip_range}")
    if kl_weight < 0.0:
        raise ValueError(f"kl_weight must not be negative, got {kl_weight}")
    if kl_weight > 0.0 and reference_output is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference_output")


def _needs_grad(model_output: Tensor, uncond_output: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        model_output.requires_grad or (uncond_output is not None and uncond_output.requires_grad)
    )


def loop_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    rewards: Tensor,
    trajectory: Tensor,
    *,
    clip_range: float | None,
    advantage_scale: float | Tensor = 1.0,
    advantage_clip: float | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    reference_output: Tensor | None = None,
    kl_weight: float = 0.0,
    reduction: str = "mean",
) -> LoopLoss:
    """The objective of LOOP: leave-one-out advantages in PPO's clipped surrogate (Gupta et al., 2025).

    ``loss = mean_N(max(-A r, -A clip(r, 1 - eps, 1 + eps)) + kl_weight KL)`` with
    ``r = exp(logprob - old_logprob)``, the exponent clamped to +-20. Without `clip_range` it is the surrogate
    of RLOO (with ``r = 1`` its gradient is REINFORCE's).

    Args:
        model_output: ``[N, *L]``, float32, float16, bfloat16 or float64; the conditional output ``c``.
        sample: ``[N, *L]``, ``x_t``.
        prev_sample: ``[N, *L]``, ``x_{t-1}``.
        table: float32 (or float64) ``[T, 3]``, columns a, b, sigma of every step.
        step: int64 ``[N]``, the row of `table` each sample is at.
        old_logprob: float32 (or float64) ``[N]``, as `denoise_step` gave it.
        rewards: float32 (or float64) ``[G, K]``, a group of K samples in a row.
        trajectory: int64 ``[N]``, the flat entry of `rewards` each row belongs to.
        clip_range: eps, or None for no clipping.
        advantage_scale: multiplies the leave-one-out difference: a number, or a scalar tensor on the device.
        advantage_clip: the scaled advantage is clamped to +- this.
        uncond_output: ``[N, *L]``, the unconditional output ``u``.
        guidance_scale: ``g``; other than 1 it needs `uncond_output`.
        reference_output: ``[N, *L]``, the reference model's output, guidance included. Data, no gradient.
        kl_weight: weight of the KL divergence from the reference; above 0 it needs `reference_output`.
        reduction: ``"mean"`` (over a row's elements) or ``"sum"``, of the log-probability and the KL.

    Returns:
        The loss, differentiable in `model_output` and `uncond_output`, and what went into it by row.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or value (``K = 1`` among them); on the CPU also an index out of
            range.
    """
    check_tensor("rewards", rewards, dtypes=REAL_DTYPES, device=model_output.device)
    if rewards.dim() != 2:
        raise ValueError(f"rewards must have shape [G, K], got {list(rewards.shape)}")
    check_group(rewards)
    latents = {
        "sample": sample,
        "prev_sample": prev_sample,
        "uncond_output": uncond_output,
        "reference_output": reference_output,
    }
    check_transition(model_output, latents, table, step, guidance_scale, reduction)
    rows, device = model_output.shape[:1], model_output.device
    check_tensor("old_logprob", old_logprob, dtypes=REAL_DTYPES, shape=rows, device=device)
    check_tensor("trajectory", trajectory, dtypes=(torch.int64,), shape=rows, device=device)
    _check_options(clip_range, reference_output, kl_weight)
    if advantage_clip is not None and advantage_clip <= 0.0:
        raise ValueError(f"advantage_clip must be positive, or None, got {advantage_clip}")
    if isinstance(advantage_scale, Tensor):
        check_tensor("advantage_scale", advantage_scale, dtypes=REAL_DTYPES, shape=(), device=device)
        scale = advantage_scale.detach()
    else:
        scale = torch.full((), float(advantage_scale), dtype=torch.float64, device=device)
    loss, logprob, ratio, advantage, clipped, kl, _ = _loop_loss(
        model_output.contiguous(),
        sample.contiguous(),
        prev_sample.contiguous(),
        table.contiguous(),
        step.contiguous(),
        old_logprob.contiguous(),
        rewards.contiguous(),
        trajectory.contiguous(),
        scale,
        None if advantage_clip is None else float(advantage_clip),
        None if clip_range is None else float(clip_range),
        None if uncond_output is None else uncond_output.contiguous(),
        float(guidance_scale),
        None if reference_output is None else reference_output.contiguous(),
        float(kl_weight),
        reduction,
        _needs_grad(model_output, uncond_output),
    )
    return LoopLoss(loss, logprob, ratio, advantage, clipped, kl)


def clipped_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float | None,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    reference_output: Tensor | None = None,
    kl_weight: float = 0.0,
    reduction: str = "mean",
) -> LoopLoss:
    """PPO's clipped surrogate with advantages from elsewhere.

    Schulman et al., 2017; for diffusion models DDPO, Black et al., 2023. As `loop_loss`, for baselines other
    than leave-one-out.

    Args:
        model_output: ``[N, *L]``, float32, float16, bfloat16 or float64; the conditional output ``c``.
        sample: ``[N, *L]``, ``x_t``.
        prev_sample: ``[N, *L]``, ``x_{t-1}``.
        table: float32 (or float64) ``[T, 3]``, columns a, b, sigma of every step.
        step: int64 ``[N]``, the row of `table` each sample is at.
        old_logprob: float32 (or float64) ``[N]``, as `denoise_step` gave it.
        advantage: float32 (or float64) ``[N]``, taken as it is.
        clip_range: eps, or None for no clipping.
        uncond_output: ``[N, *L]``, the unconditional output ``u``.
        guidance_scale: ``g``; other than 1 it needs `uncond_output`.
        reference_output: ``[N, *L]``, the reference model's output, guidance included. Data, no gradient.
        kl_weight: weight of the KL divergence from the reference; above 0 it needs `reference_output`.
        reduction: ``"mean"`` (over a row's elements) or ``"sum"``, of the log-probability and the KL.

    Returns:
        The loss, differentiable in `model_output` and `uncond_output`, and what went into it by row.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or value; on the CPU also a step outside the table.
    """
    latents = {
        "sample": sample,
        "prev_sample": prev_sample,
        "uncond_output": uncond_output,
        "reference_output": reference_output,
    }
    check_transition(model_output, latents, table, step, guidance_scale, reduction)
    rows, device = model_output.shape[:1], model_output.device
    check_tensor("old_logprob", old_logprob, dtypes=REAL_DTYPES, shape=rows, device=device)
    check_tensor("advantage", advantage, dtypes=REAL_DTYPES, shape=rows, device=device)
    _check_options(clip_range, reference_output, kl_weight)
    loss, logprob, ratio, clipped, kl, _ = _clipped_loss(
        model_output.contiguous(),
        sample.contiguous(),
        prev_sample.contiguous(),
        table.contiguous(),
        step.contiguous(),
        old_logprob.contiguous(),
        advantage.contiguous(),
        None if clip_range is None else float(clip_range),
        None if uncond_output is None else uncond_output.contiguous(),
        float(guidance_scale),
        None if reference_output is None else reference_output.contiguous(),
        float(kl_weight),
        reduction,
        _needs_grad(model_output, uncond_output),
    )
    return LoopLoss(loss, logprob, ratio, advantage.detach(), clipped, kl)
