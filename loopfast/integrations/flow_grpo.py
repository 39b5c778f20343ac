"""Flow-GRPO (Liu et al., 2025; github.com/yifan123/flow_grpo) on the fused ops."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .patching import Patch, check_noise, find_original, import_target
from .steps import Generators, Transitions, check_known, differentiates_sampling, draw_seeds

_FEATURE = "patch_flow_grpo()"
_PARAMETERS = "self model_output timestep sample noise_level prev_sample generator sde_type return_sqrt_dt"


class _Schedule(NamedTuple):
    """A scheduler's steps at one noise level.

    Attributes:
        transitions: what the ops work on.
        spread: float32 ``[T + 1]``, the noise of a unit of time.
        duration: float32 ``[T + 1]``, the square root of the steps' lengths.
        timesteps: float32 ``[T]``.
        sources: what it was made from.
    """

    transitions: Transitions
    spread: Tensor
    duration: Tensor
    timesteps: Tensor
    sources: tuple[Tensor, Tensor]


_schedules: WeakKeyDictionary[Any, dict[tuple[Any, ...], _Schedule]] = WeakKeyDictionary()


def patch_flow_grpo(
    *, noise: str = "torch", module: str = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
) -> Patch:
    """Replace ``sde_step_with_logprob`` wherever it is bound.

    Same results as the original to the rounding of float32 and the same random stream.

    Args:
        noise: ``"torch"``, or ``"philox"`` for noise made inside the kernel from a seed a row: faster, but another
            random stream.
        module: where a fork of Flow-GRPO defines the function.

    Returns:
        The patch, already in place: undo it, or use it as a context manager.

    Raises:
        LoopfastError: Flow-GRPO cannot be imported, or its function is another version.
        ValueError: `noise` is unknown. From the step: `sde_type` is not ``"sde"``.
    """
    check_noise(noise)
    target = import_target(_FEATURE, module, "Flow-GRPO (github.com/yifan123/flow_grpo)")
    original = find_original(_FEATURE, target, "sde_step_with_logprob", _PARAMETERS)
    randn = target.randn_tensor

    @functools.wraps(original)
    def sde_step_with_logprob(
        self: Any,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        noise_level: float = 0.7,
        prev_sample: Tensor | None = None,
        generator: Generators = None,
        sde_type: str = "sde",
        return_sqrt_dt: bool = False,
    ) -> tuple[Tensor, ...]:
        if sde_type != "sde":
            raise ValueError(f"sde_type={sde_type!r} has no replacement: undo the patch to use it")
        if differentiates_sampling(model_output, sample, prev_sample):
            return original(
                self,
                model_output,
                timestep,
                sample,
                noise_level,
                prev_sample,
                generator,
                sde_type,
                return_sqrt_dt,
            )
        schedule = _schedule(self, noise_level, sample.device)
        index = _index(schedule, timestep)
        step = index.expand(sample.shape[0]).contiguous()
        model_output, sample = model_output.float(), sample.float()
        transitions = schedule.transitions
        a, b, sigma = transitions.coefficients(index, sample.dim())
        mean = torch.addcmul(a * sample, b, model_output)
        if prev_sample is not None:
            prev_sample = prev_sample.float()
            logprob = transitions.score(model_output, sample, prev_sample, step)
        elif noise == "philox":
            seed = draw_seeds(len(sample), generator, sample.device)
            prev_sample, logprob = transitions.draw_philox(model_output, sample, step, seed)
        else:
            drawn = randn(
                model_output.shape,
                generator=generator,
                device=model_output.device,
                dtype=model_output.dtype,
            )
            prev_sample = torch.addcmul(mean, sigma, drawn)
            logprob = transitions.score(model_output, sample, prev_sample, step)
        shape = (-1, *[1] * (sample.dim() - 1))
        result = prev_sample, logprob, mean, schedule.spread[index].reshape(shape)
        return (*result, schedule.duration[index].reshape(shape)) if return_sqrt_dt else result

    return Patch([(original, sde_step_with_logprob, None)])


def _schedule(scheduler: Any, noise_level: float, device: torch.device) -> _Schedule:
    # set_timesteps replaces both tensors; referenced by the entry, they keep their ids to themselves.
    sources = (scheduler.sigmas, scheduler.timesteps)
    schedules = _schedules.setdefault(scheduler, {})
    key = (*map(id, sources), float(noise_level), device)
    if key not in schedules:
        for old in [old for old in schedules if old[:2] != key[:2]]:
            del schedules[old]
        schedules[key] = _make(*sources, float(noise_level), device)
    return schedules[key]


def _make(sigmas: Tensor, timesteps: Tensor, noise_level: float, device: torch.device) -> _Schedule:
    """As `loopfast.schedules` makes it, but of the sigmas the scheduler was given and without leaving the device."""
    levels = sigmas.to(device, torch.float64)
    now, stride = levels[:-1], levels.diff()
    # At pure noise the spread would be infinite; the originals take it at the end of the first step.
    remaining = 1 - torch.where(now == 1, levels[1], now)
    spread = noise_level * (now / remaining).sqrt()
    duration = (-stride).sqrt()
    drift = noise_level**2 / (2 * remaining)
    table = torch.stack([1 + drift * stride, (1 + drift * (1 - now)) * stride, spread * duration], dim=1)
    deterministic = torch.ones_like(now, dtype=torch.bool) if noise_level == 0 else None

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_full((1,), float("nan"))]).to(torch.float32)

    return _Schedule(
        Transitions.of(table, deterministic),
        padded(spread),
        padded(duration),
        timesteps.to(device),
        (sigmas, timesteps),
    )


def _index(schedule: _Schedule, timestep: Tensor) -> Tensor:
    """Where in the schedule each timestep is, and T where it is none of it."""
    known = schedule.timesteps
    timestep = timestep.to(known.device)
    matches = timestep[:, None] == known
    index = torch.where(matches.any(1), matches.int().argmax(1), len(known))
    check_known(timestep, index, len(known))
    return index
