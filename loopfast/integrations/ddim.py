"""DDPO's step for diffusers' ``DDIMScheduler``, as TRL and ddpo-pytorch have it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loopfast.schedules import transition_schedule

from .steps import Generators, Source, Transitions, check_known

PARAMETERS = "self model_output timestep sample eta use_clipped_model_output generator prev_sample"


class _Entry(NamedTuple):
    transitions: Transitions
    step_of: Tensor
    sources: tuple[Any, ...]


_tables: WeakKeyDictionary[Any, dict[tuple[Any, ...], _Entry]] = WeakKeyDictionary()


def ddim_steps(
    scheduler: Any, timestep: Tensor, rows: int, eta: float, device: torch.device
) -> tuple[Transitions, Tensor]:
    """The transitions of a scheduler and where in them each row is.

    The table is made once for each number of steps, eta and device, and again when the scheduler's configuration or its
    alphas are replaced.

    Args:
        scheduler: diffusers' ``DDIMScheduler`` after ``set_timesteps``.
        timestep: int64 ``[]``, ``[1]`` or ``[rows]``, on any device.
        rows: number of rows.
        eta: DDIM's noise, 0 to 1.
        device: where the samples are.

    Returns:
        The transitions and int64 ``[rows]``, both on `device`.

    Raises:
        ValueError: the scheduler or one of its options has no Gaussian transition, ``set_timesteps`` was not called, or
            (on the CPU) a timestep is none of the scheduler's.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no steps yet: call its set_timesteps first")
    # What the table is made of stays referenced by the entry, so no other object can take over an id.
    sources = (scheduler.config, scheduler.alphas_cumprod)
    key = (scheduler.num_inference_steps, float(eta), device, *map(id, sources))
    entries = _tables.setdefault(scheduler, {})
    entry = entries.get(key)
    if entry is None:
        entry = entries[key] = _Entry(*_make(scheduler, float(eta), device), sources)
    # Expanded first: an index of no dimensions is read on the host.
    timesteps = timestep.to(device).expand(rows)
    step = entry.step_of[timesteps]
    check_known(timesteps, step, len(entry.transitions.table) - 1)
    return entry.transitions, step


def _make(scheduler: Any, eta: float, device: torch.device) -> tuple[Transitions, Tensor]:
    # The last step of these codebases ends at timestep 0 whatever the scheduler's set_alpha_to_one says.
    ending = copy.copy(scheduler)
    ending.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    schedule = transition_schedule(ending, scheduler.num_inference_steps, eta=eta)
    deterministic = schedule.table64[:, 2] == 0
    transitions = Transitions.of(
        schedule.table.to(device), deterministic.to(device) if bool(deterministic.any()) else None
    )
    step_of = torch.full((len(scheduler.alphas_cumprod),), len(schedule))
    step_of[schedule.timesteps] = torch.arange(len(schedule))
    return transitions, step_of.to(device)


def ddim_step(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    eta: float,
    use_clipped_model_output: bool,
    generator: Generators,
    prev_sample: Tensor | None,
    *,
    source: Source,
) -> tuple[Tensor, Tensor]:
    """Draw ``x_{t-1}``, or take the one that is given, and score it.

    Args:
        scheduler: diffusers' ``DDIMScheduler`` after ``set_timesteps``.
        model_output: ``[N, *L]``, guidance included.
        timestep: int64 ``[]``, ``[1]`` or ``[N]``.
        sample: ``[N, *L]``, ``x_t``.
        eta: DDIM's noise, 0 to 1.
        use_clipped_model_output: must be False.
        generator: of the noise, or one for each row.
        prev_sample: ``[N, *L]``, or None to draw it.
        source: where the noise comes from.

    Returns:
        ``x_{t-1}`` in the dtype of `sample`, and its log-probability, float32 ``[N]``, differentiable in
        `model_output`.

    Raises:
        ValueError: an option has no Gaussian transition, or as the original.
    """
    if use_clipped_model_output:
        raise ValueError(
            "use_clipped_model_output=True makes the mean nonlinear in the model output; set it to False"
        )
    transitions, step = ddim_steps(scheduler, timestep, sample.shape[0], eta, sample.device)
    return transitions.advance(model_output, sample, step, prev_sample, generator, source)
