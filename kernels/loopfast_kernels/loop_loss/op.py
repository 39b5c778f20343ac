"""Registration of ``loopfast::loop_loss`` and ``loopfast::clipped_loss``.

The gradients are results of the forward pass. The backward pass scales them in place and hands them over; nothing
else is kept for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..leave_one_out.op import check_group
from ..registration import Operator, dispatched
from ..transition_logprob.reference import arithmetic_dtype
from ..validation import REAL_DTYPES, check_tensor, check_transition
from . import reference

_LOOP = backends.Implementations(__package__, "loop_loss")
_CLIPPED = backends.Implementations(__package__, "clipped_loss")
_SCALE_GRADIENTS = backends.Implementations(__package__, "scale_gradients_")

_TRANSITION = (
    "Tensor model_output, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, Tensor old_logprob"
)
_OPTIONS = (
    "float? clip_range, Tensor? uncond_output, float guidance_scale, Tensor? reference_output, "
    "float kl_weight, str reduction, bool with_grad, bool with_uncond_grad"
)
_RESULTS = (
    "(Tensor loss, Tensor logprob, Tensor ratio, {advantage}Tensor clipped, Tensor kl, Tensor grad_output, "
    "Tensor grad_uncond, Tensor grad_scale)"
)


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


def _latents(arguments: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    uncond_output, _, reference_output = arguments[-7:-4]
    return (*arguments[:3], uncond_output, reference_output)


def _without_advantage(result: reference.LossAndGradient) -> tuple[Tensor, ...]:
    return (*result[:3], *result[4:])


def _fake_results(arguments: tuple[Any, ...]) -> reference.LossAndGradient:
    model_output, sample, *_ = arguments
    uncond_output, *_, with_grad, with_uncond_grad = arguments[-7:]
    rows = model_output.shape[:1]
    dtype = arithmetic_dtype(model_output, sample)

    def by_row(dtype: torch.dtype) -> Tensor:
        return model_output.new_empty(rows, dtype=dtype)

    scaled = (with_grad or with_uncond_grad) and reference.has_scaled_rows(model_output, uncond_output)
    return reference.LossAndGradient(
        loss=model_output.new_empty((), dtype=dtype),
        logprob=by_row(dtype),
        ratio=by_row(dtype),
        advantage=by_row(dtype),
        clipped=by_row(torch.bool),
        kl=by_row(dtype),
        grad_output=model_output.new_empty(model_output.shape if with_grad else (0,)),
        grad_uncond=(model_output if uncond_output is None else uncond_output).new_empty(
            model_output.shape if with_uncond_grad else (0,)
        ),
        grad_scale=model_output.new_empty(rows if scaled else (0,), dtype=dtype),
    )


class _Handover(torch.autograd.Function):
    """Gives the gradients that were made with the loss to the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, model_output: Tensor, uncond_output: Tensor | None, results: tuple[Tensor, ...]
    ) -> Tensor:
        loss, *_, grad_output, grad_uncond, grad_scale = results
        ctx.gradients = grad_output, grad_uncond, grad_scale
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of the loss was taken before: retain_graph=True keeps it for another time"
            )
        grad_output, grad_uncond, grad_scale = ctx.gradients
        # On the CPU a look costs less than a call that has nothing to do.
        unscaled = not (grad_scale.numel() or grad_loss.is_cuda) and grad_loss.item() == 1.0
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # Another backward pass would need what this one overwrites.
            grad_output, grad_uncond = grad_output.clone(), grad_uncond.clone()
        else:
            ctx.gradients = None
        if not unscaled:
            _scale_gradients_(grad_output, grad_uncond, grad_scale, grad_loss)
        return (
            grad_output if grad_output.numel() else None,
            grad_uncond if grad_uncond.numel() else None,
            None,
        )


# Past a look for function transforms: `dispatched` has looked.
_hand_over = super(torch.autograd.Function, _Handover).apply


class _Recorded(torch.autograd.Function):
    """The same where the operator is traced: its backward pass overwrites nothing."""

    operator: Operator

    @classmethod
    def forward(cls, ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = cls.operator.below_autograd(*inputs)
        ctx.save_for_backward(*results[-3:])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.inputs = len(inputs)
        return results

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_output, grad_uncond, grad_scale = ctx.saved_tensors
        grad_output, grad_uncond = grad_output.clone(), grad_uncond.clone()
        _scale_gradients_(grad_output, grad_uncond, grad_scale, grad_loss)
        grads: list[Tensor | None] = [None] * ctx.inputs
        grads[0] = grad_output if grad_output.numel() else None
        grads[-7] = grad_uncond if grad_uncond.numel() else None
        return tuple(grads)


class _LoopLossRecorded(_Recorded):
    pass


class _ClippedLossRecorded(_Recorded):
    pass


_LoopLossRecorded.operator = _loop_loss = Operator(
    f"loop_loss({_TRANSITION}, Tensor rewards, Tensor trajectory, Tensor advantage_scale, "
    f"float? advantage_clip, {_OPTIONS}) -> {_RESULTS.format(advantage='Tensor advantage, ')}",
    lambda *arguments: tuple(_LOOP.choose(*_latents(arguments))(*arguments)),
    lambda *arguments: tuple(_fake_results(arguments)),
    _LoopLossRecorded,
)
_ClippedLossRecorded.operator = _clipped_loss = Operator(
    f"clipped_loss({_TRANSITION}, Tensor advantage, {_OPTIONS}) -> {_RESULTS.format(advantage='')}",
    lambda *arguments: _without_advantage(_CLIPPED.choose(*_latents(arguments))(*arguments)),
    lambda *arguments: _without_advantage(_fake_results(arguments)),
    _ClippedLossRecorded,
)
_scale_gradients_ = Operator(
    "scale_gradients_(Tensor(a!) grad_output, Tensor(b!) grad_uncond, Tensor grad_scale, Tensor grad_loss) -> ()",
    lambda *arguments: _SCALE_GRADIENTS.choose(*arguments)(*arguments),
    lambda *_: None,
)


def _run(operator: Operator, plain: bool, model_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Every result but the gradients; the loss has them for its backward pass."""
    uncond_output = rest[-5]
    arguments = (model_output, *rest, _needs_grad(model_output), _needs_grad(uncond_output))
    if not plain:
        results: tuple[Tensor, ...] = operator(*arguments)
        return results[:-3]
    results = operator.directly(*arguments)
    if not (arguments[-2] or arguments[-1]):
        return results[:-3]
    return _hand_over(model_output, uncond_output, results), *results[1:-3]


def _check_options(clip_range: float | None, reference_output: Tensor | None, kl_weight: float) -> None:
    if clip_range is not None and not 0.0 < clip_range < 1.0:
        raise ValueError(f"clip_range must lie between 0 and 1, or be None, got {clip_range}")
    if kl_weight < 0.0:
        raise ValueError(f"kl_weight must not be negative, got {kl_weight}")
    if kl_weight > 0.0 and reference_output is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference_output")


@lru_cache(maxsize=64)
def _factor(value: float, dtype: torch.dtype) -> Tensor:
    # A tensor that is at hand costs a tenth of one that is made.
    return torch.full((), value, dtype=dtype, device="cpu")


def _needs_grad(output: Tensor | None) -> bool:
    return output is not None and output.requires_grad and torch.is_grad_enabled()


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
    plain = not dispatched(model_output)
    if isinstance(advantage_scale, Tensor):
        check_tensor("advantage_scale", advantage_scale, dtypes=REAL_DTYPES, shape=(), device=device)
        scale = advantage_scale.detach()
    else:
        # For float64 inputs a factor of their precision; elsewhere one that needs no conversion.
        dtype = arithmetic_dtype(model_output, sample)
        if plain and device.type == "cpu":
            scale = _factor(float(advantage_scale), dtype)
        else:
            scale = torch.full((), float(advantage_scale), dtype=dtype, device=device)
    loss, logprob, ratio, advantage, clipped, kl = _run(
        _loop_loss,
        plain,
        model_output,
        sample,
        prev_sample,
        table,
        step,
        old_logprob,
        rewards,
        trajectory,
        scale,
        None if advantage_clip is None else float(advantage_clip),
        None if clip_range is None else float(clip_range),
        uncond_output,
        float(guidance_scale),
        reference_output,
        float(kl_weight),
        reduction,
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
    loss, logprob, ratio, clipped, kl = _run(
        _clipped_loss,
        not dispatched(model_output),
        model_output,
        sample,
        prev_sample,
        table,
        step,
        old_logprob,
        advantage,
        None if clip_range is None else float(clip_range),
        uncond_output,
        float(guidance_scale),
        reference_output,
        float(kl_weight),
        reduction,
    )
    return LoopLoss(loss, logprob, ratio, advantage.detach(), clipped, kl)
