"""Flow-GRPO (Liu et al., 2025; github.com/yifan123/flow_grpo) on the fused ops."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loopfast.errors import LoopfastError

from .patching import Function, Patch, check_noise, find_original, import_target
from .steps import Generators, Source, Transitions, check_known, differentiates_sampling

_FEATURE = "patch_flow_grpo()"
_SDE_STEP = "self model_output timestep sample noise_level prev_sample generator sde_type return_sqrt_dt"
_SOLVER_STEP = "model_output latents eta sigmas index prev_sample generator"


class _Schedule(NamedTuple):
    """The steps of a scheduler at one noise level, followed by a row of NaN for unknown timesteps.

    Attributes:
        transitions: the table for the ops.
        spread: float32 ``[T + 1]``, the noise per unit of time.
        duration: float32 ``[T + 1]``, the square roots of the steps' lengths.
    """

    transitions: Transitions
    spread: Tensor
    duration: Tensor


# set_timesteps makes new sigmas; a schedule is dropped together with the sigmas that it was made from.
_schedules = WeakTensorKeyDictionary()


def patch_flow_grpo(
    *, noise: str = "torch", module: str = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
) -> Patch:
    """Replaces ``sde_step_with_logprob``, and ``flow_grpo_step`` of the ``solver`` beside it, wherever they are bound.

    The results are those of the originals up to the rounding of float32, from the same random stream.

    Args:
        noise: ``"torch"``, or ``"philox"`` for noise that the kernel makes from one seed per row, which is faster but
            another random stream.
        module: where a fork of Flow-GRPO defines ``sde_step_with_logprob``; it may have no solver.

    Returns:
        The patch, already in place. Undo it, or use it as a context manager.

    Raises:
        LoopfastError: Flow-GRPO cannot be imported, or its functions are other versions.
        ValueError: `noise` is unknown. From the step: `sde_type` is not ``"sde"``.
    """
    check_noise(noise)
    target = import_target(_FEATURE, module, "Flow-GRPO (github.com/yifan123/flow_grpo)")
    source = Source(noise, target.randn_tensor)
    step = find_original(_FEATURE, target, "sde_step_with_logprob", _SDE_STEP)
    replacements = [(step, _sde_step(step, source), None)]
    solver = _solver(module) if "." in module else None
    if solver is not None:
        step = find_original(_FEATURE, solver, "flow_grpo_step", _SOLVER_STEP)
        replacements.append((step, _solver_step(step, source), None))
    return Patch(replacements)


def _solver(module: str) -> ModuleType | None:
    """The module with ``flow_grpo_step`` beside the given one, or None."""
    name = f"{module.rpartition('.')[0]}.solver"
    try:
        solver = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None
        raise LoopfastError(f"{_FEATURE} cannot import {name} ({error})") from error
    return solver if "flow_grpo_step" in vars(solver) else None


def _sde_step(original: Function, source: Source) -> Function:
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
            options = (noise_level, prev_sample, generator, sde_type, return_sqrt_dt)
            return original(self, model_output, timestep, sample, *options)
        schedule = _schedule(self.sigmas, noise_level, sample.device)
        index = _index(self.timesteps.to(sample.device), timestep.to(sample.device))
        model_output, sample = model_output.float(), sample.float()
        # The original accepts a generator beside a given sample, and does not use it.
        if prev_sample is not None:
            prev_sample, generator = prev_sample.float(), None
        transitions, rows = schedule.transitions, index.expand(len(sample)).contiguous()
        prev_sample, logprob = transitions.advance(model_output, sample, rows, prev_sample, generator, source)
        a, b, _ = transitions.coefficients(index, sample.dim())
        mean = torch.addcmul(a * sample, b, model_output)
        shape = (-1, *[1] * (sample.dim() - 1))
        result = prev_sample, logprob, mean, schedule.spread[index].reshape(shape)
        return (*result, schedule.duration[index].reshape(shape)) if return_sqrt_dt else result

    return sde_step_with_logprob


def _solver_step(original: Function, source: Source) -> Function:
    @functools.wraps(original)
    def flow_grpo_step(
        model_output: Tensor,
        latents: Tensor,
        eta: float,
        sigmas: Tensor,
        index: int,
        prev_sample: Tensor | None,
        generator: Generators = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if differentiates_sampling(model_output, latents, prev_sample):
            return original(model_output, latents, eta, sigmas, index, prev_sample, generator)
        transitions = _schedule(sigmas, eta, latents.device).transitions
        step = torch.full((len(latents),), index, device=latents.device)
        prev_sample, logprob = transitions.advance(
            model_output, latents, step, prev_sample, generator, source
        )
        clean = latents - sigmas[index].to(latents.device) * model_output
        return prev_sample, clean, logprob

    return flow_grpo_step


def _schedule(sigmas: Tensor, noise_level: float, device: torch.device) -> _Schedule:
    schedules: dict[tuple[float, torch.device], _Schedule] = _schedules.setdefault(sigmas, {})
    key = (float(noise_level), device)
    if key not in schedules:
        schedules[key] = make_schedule(sigmas, *key)
    return schedules[key]


def make_schedule(sigmas: Tensor, noise_level: float, device: torch.device) -> _Schedule:
    """Makes the steps between given sigmas, ``[T + 1]`` in float32, without leaving the device.

    `loopfast.schedules` makes the same table from a scheduler's own sigmas. Pipelines with dynamic shifting use
    others.
    """
    levels = sigmas.to(device, torch.float64)
    now, stride = levels[:-1], levels.diff()
    # At pure noise the spread would be infinite; the originals use its value at the end of the first step.
    remaining = 1 - torch.where(now == 1, levels[1], now)
    spread = noise_level * (now / remaining).sqrt()
    duration = (-stride).sqrt()
    drift = noise_level**2 / (2 * remaining)
    table = torch.stack([1 + drift * stride, (1 + drift * (1 - now)) * stride, spread * duration], dim=1)
    deterministic = torch.ones_like(now, dtype=torch.bool) if noise_level == 0 else None

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_full((1,), float("nan"))]).to(torch.float32)

    return _Schedule(Transitions.of(table, deterministic), padded(spread), padded(duration))


def _index(timesteps: Tensor, timestep: Tensor) -> Tensor:
    """The position in `timesteps` ``[T]`` of each timestep, and T for an unknown one."""
    matches = timestep[:, None] == timesteps
    index = torch.where(matches.any(1), matches.int().argmax(1), len(timesteps))
    check_known(timestep, index, len(timesteps))
    return index
