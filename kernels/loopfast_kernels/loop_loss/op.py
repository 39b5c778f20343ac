"""Registration of ``loopfast::loop_loss`` and ``loopfast::clipped_loss``.

The gradients are results of the forward pass. The backward pass scales them in place and hands them over; autograd
keeps nothing else for it.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..leave_one_out.op import check_group
from ..registration import Operator, dispatched, select
from ..transition import Transition
from ..transition_logprob.reference import arithmetic_dtype
from ..validation import REAL_DTYPES, check_tensor, check_transition
from .reference import LossAndGradient, Options, Rewards, has_scaled_rows

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


# An operator may not return one of its arguments: `clipped_loss` gives no advantage.
_without_advantage = attrgetter(*(name for name in LossAndGradient._fields if name != "advantage"))


def _compute(
    implementations: backends.Implementations, arguments: Any, rewards_or_advantage: Rewards | Tensor
) -> LossAndGradient:
    transition, options = select(Transition, arguments), select(Options, arguments)
    prev_sample = arguments.prev_sample
    compute = implementations.choose(
        transition.model_output,
        transition.sample,
        prev_sample,
        transition.uncond_output,
        options.reference_output,
    )
    results: LossAndGradient = compute(
        transition, prev_sample, arguments.old_logprob, rewards_or_advantage, options
    )
    return results


def _fake(arguments: Any) -> LossAndGradient:
    transition, options = select(Transition, arguments), select(Options, arguments)
    output, uncond = transition.model_output, transition.uncond_output
    rows = output.shape[:1]
    dtype = arithmetic_dtype(output, transition.sample)
    return LossAndGradient(
        loss=output.new_empty((), dtype=dtype),
        logprob=output.new_empty(rows, dtype=dtype),
        ratio=output.new_empty(rows, dtype=dtype),
        advantage=output.new_empty(rows, dtype=dtype),
        clipped=output.new_empty(rows, dtype=torch.bool),
        kl=output.new_empty(rows, dtype=dtype),
        grad_output=output.new_empty(output.shape if options.with_grad else (0,)),
        grad_uncond=(output if uncond is None else uncond).new_empty(
            output.shape if options.with_uncond_grad else (0,)
        ),
        grad_scale=output.new_empty(rows if has_scaled_rows(transition, options) else (0,), dtype=dtype),
    )


class _Handover(torch.autograd.Function):
    """Gives the gradients that were made with the loss to the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, model_output: Tensor, uncond_output: Tensor | None, results: tuple[Tensor, ...]
    ) -> Tensor:
        loss, *ctx.gradients = results
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of the loss was taken before: retain_graph=True keeps it for another time"
            )
        grad_output, grad_uncond, grad_scale = ctx.gradients
        # On the CPU it costs less to look at the value than to make a call that has nothing to do.
        unscaled = not (grad_scale.numel() or grad_loss.is_cuda) and grad_loss.item() == 1.0
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # Another backward pass would need the values that this one overwrites.
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


# This skips autograd's look for function transforms: `dispatched` has looked.
_hand_over = super(torch.autograd.Function, _Handover).apply


class _Recorded(torch.autograd.Function):
    """The gradient where the operator is traced: its backward pass overwrites nothing."""

    operator: Operator

    @classmethod
    def forward(cls, ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = cls.operator.below_autograd(*inputs)
        _, *by_row, grad_output, grad_uncond, grad_scale = results
        ctx.save_for_backward(grad_output, grad_uncond, grad_scale)
        ctx.mark_non_differentiable(*by_row, grad_output, grad_uncond, grad_scale)
        ctx.set_materialize_grads(False)
        ctx.no_gradients = cls.operator.named(*(None for _ in inputs))
        return results

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_output, grad_uncond, grad_scale = ctx.saved_tensors
        grad_output, grad_uncond = grad_output.clone(), grad_uncond.clone()
        _scale_gradients_(grad_output, grad_uncond, grad_scale, grad_loss)
        gradients: tuple[Tensor | None, ...] = ctx.no_gradients._replace(
            model_output=grad_output if grad_output.numel() else None,
            uncond_output=grad_uncond if grad_uncond.numel() else None,
        )
        return gradients


_loop_loss = Operator(
    f"loop_loss({_TRANSITION}, Tensor rewards, Tensor trajectory, Tensor advantage_scale, "
    f"float? advantage_clip, {_OPTIONS}) -> {_RESULTS.format(advantage='Tensor advantage, ')}",
    lambda arguments: tuple(_compute(_LOOP, arguments, select(Rewards, arguments))),
    lambda arguments: tuple(_fake(arguments)),
    _Recorded,
)
_clipped_loss = Operator(
    f"clipped_loss({_TRANSITION}, Tensor advantage, {_OPTIONS}) -> {_RESULTS.format(advantage='')}",
    lambda arguments: _without_advantage(_compute(_CLIPPED, arguments, arguments.advantage)),
    lambda arguments: _without_advantage(_fake(arguments)),
    _Recorded,
)
_scale_gradients_ = Operator(
    "scale_gradients_(Tensor(a!) grad_output, Tensor(b!) grad_uncond, Tensor grad_scale, Tensor grad_loss) -> ()",
    lambda gradients: _SCALE_GRADIENTS.choose(*gradients)(*gradients),
    lambda _: None,
)


def _run(operator: Operator, plain: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Returns every result but the gradients, which the loss has for its backward pass."""
    results = operator.directly(*arguments) if plain else operator(*arguments)
    loss, *by_row, grad_output, grad_uncond, grad_scale = results
    if plain:
        named = operator.named(*arguments)
        if named.with_grad or named.with_uncond_grad:
            gradients = grad_output, grad_uncond, grad_scale
            loss = _hand_over(named.model_output, named.uncond_output, (loss, *gradients))
    return (loss, *by_row)


def _check_options(clip_range: float | None, reference_output: Tensor | None, kl_weight: float) -> None:
    if clip_range is not None and not 0.0 < clip_range < 1.0:
        raise ValueError(f"clip_range must lie between 0 and 1, or be None, got {clip_range}")
    if kl_weight < 0.0:
        raise ValueError(f"kl_weight must not be negative, got {kl_weight}")
    if kl_weight > 0.0 and reference_output is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference_output")


@lru_cache(maxsize=64)
def _cpu_scalar(value: float, dtype: torch.dtype) -> Tensor:
    # A tensor that is kept costs a tenth of one that is made.
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
    """Returns the objective of LOOP: leave-one-out advantages in PPO's clipped surrogate (Gupta et al., 2025).

    ``loss = mean_N(max(-A r, -A clip(r, 1 - eps, 1 + eps)) + kl_weight KL)`` with
    ``r = exp(logprob - old_logprob)``, the exponent clamped to +-20. Without `clip_range` it is the surrogate
    of RLOO; where ``r = 1`` its gradient is that of REINFORCE.

    Args:
        model_output: ``[N, *L]``, float32, float16, bfloat16 or float64; the conditional output ``c``.
        sample: ``[N, *L]``, ``x_t``.
        prev_sample: ``[N, *L]``, ``x_{t-1}``.
        table: float32 (or float64) ``[T, 3]``, columns a, b, sigma of every step.
        step: int64 ``[N]``, the row of `table` each sample is at.
        old_logprob: float32 (or float64) ``[N]``, as `denoise_step` gave it.
        rewards: float32 (or float64) ``[G, K]``; each row has the K samples of one group.
        trajectory: int64 ``[N]``, the flat entry of `rewards` each row belongs to.
        clip_range: eps, or None for no clipping.
        advantage_scale: factor of the leave-one-out difference: a number, or a scalar tensor on the device.
        advantage_clip: limit of the scaled advantage's magnitude, or None.
        uncond_output: ``[N, *L]``, the unconditional output ``u``.
        guidance_scale: ``g``; a value other than 1 needs `uncond_output`.
        reference_output: ``[N, *L]``, the reference model's output, guidance included. Data, no gradient.
        kl_weight: weight of the KL divergence from the reference; above 0 it needs `reference_output`.
        reduction: ``"mean"`` (over a row's elements) or ``"sum"``, of the log-probability and the KL.

    Returns:
        The loss, differentiable in `model_output` and `uncond_output`, and the values it follows from, by row.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, device or value (``K = 1`` is one); on the CPU also an index out of range.
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
        # Float64 inputs need a scale of their precision; a scale of the arithmetic's dtype needs no conversion.
        dtype = arithmetic_dtype(model_output, sample)
        if plain and device.type == "cpu":
            scale = _cpu_scalar(float(advantage_scale), dtype)
        else:
            scale = torch.full((), float(advantage_scale), dtype=dtype, device=device)
    results = _run(
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
        _needs_grad(model_output),
        _needs_grad(uncond_output),
    )
    return LoopLoss(*results)


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
    """Returns PPO's clipped surrogate with advantages from elsewhere.

    It is the loss of Schulman et al., 2017, and for diffusion models of DDPO, Black et al., 2023. Use it for
    baselines other than leave-one-out.

    Args:
        model_output: as in `loop_loss`, like the arguments that are not described here.
        advantage: float32 (or float64) ``[N]``, taken as it is.

    Returns:
        The loss, differentiable in `model_output` and `uncond_output`, and the values it follows from, by row.

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
        _needs_grad(model_output),
        _needs_grad(uncond_output),
    )
    return LoopLoss(loss, logprob, ratio, advantage.detach(), clipped, kl)
