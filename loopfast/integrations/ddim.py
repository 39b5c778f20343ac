"""DDPO's step for diffusers' ``DDIMScheduler``, as TRL and ddpo-pytorch have it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loopfast.schedules import transition_schedule

from .patching import Function
from .steps import Generators, Source, Transitions, check_known, differentiates_sampling

PARAMETERS = "self model_output timestep sample eta use_clipped_model_output generator prev_sample"


# The transitions of each scheduler, each timestep's position in them, and the objects that they are made from.
_tables: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[Transitions, Tensor, Any]]] = WeakKeyDictionary()


def ddim_steps(
    scheduler: Any, timestep: Tensor, rows: int, eta: float, device: torch.device
) -> tuple[Transitions, Tensor]:
    """The transitions of a scheduler, and each row's position in them.

    The table is made once for each number of steps, eta and device, and again when the scheduler's configuration or its
    alphas are replaced.

    Args:
        scheduler: diffusers' ``DDIMScheduler`` after ``set_timesteps``.
        timestep: int64 ``[]``, ``[1]`` or ``[rows]``, on any device.
        rows: the number of rows.
        eta: DDIM's noise, 0 to 1.
        device: the samples' device, and that of the transitions and the positions, int64 ``[rows]``.

    Raises:
        ValueError: the scheduler or one of its options has no Gaussian transition, ``set_timesteps`` was not called, or
            (on the CPU) a timestep is not one of the scheduler's.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no steps yet: call its set_timesteps first")
    # The entry keeps references to the objects that its table is made from, so no other object can take over an id.
    sources = (scheduler.config, scheduler.alphas_cumprod)
    key = (scheduler.num_inference_steps, float(eta), device, *map(id, sources))
    entries = _tables.setdefault(scheduler, {})
    if key not in entries:
        entries[key] = (*_make(scheduler, float(eta), device), sources)
    transitions, step_of, _ = entries[key]
    # Expand first: an index without dimensions would be read on the host.
    timesteps = timestep.to(device).expand(rows)
    step = step_of[timesteps]
    check_known(timesteps, step, len(transitions.table) - 1)
    return transitions, step


def _make(scheduler: Any, eta: float, device: torch.device) -> tuple[Transitions, Tensor]:
    # In these codebases the last step ends at timestep 0, whatever the scheduler's set_alpha_to_one is.
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


def ddim_replacement(
    original: Function, source: Source, result: Callable[[Tensor, Tensor], Any] = lambda *pair: pair
) -> Function:
    """A function that takes the place of DDPO's step: it draws ``x_{t-1}``, or takes the one given, and scores it.

    It returns ``x_{t-1}`` in the dtype of the sample, and its log-probability, float32 ``[N]``, differentiable in the
    model output. It raises ValueError where an option has no Gaussian transition, or as the original does. Calls that
    differentiate the sampling go to the original.

    Args:
        original: the step that is replaced.
        source: the source of the noise.
        result: makes the returned value of ``x_{t-1}`` and its log-probability.
    """

    @functools.wraps(original)
    def step(
        self: Any,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        prev_sample: Tensor | None = None,
    ) -> Any:
        if differentiates_sampling(model_output, sample, prev_sample):
            options = (eta, use_clipped_model_output, generator, prev_sample)
            return original(self, model_output, timestep, sample, *options)
        if use_clipped_model_output:
            raise ValueError(
                "use_clipped_model_output=True makes the mean nonlinear in the model output; set it to False"
            )
        transitions, rows = ddim_steps(self, timestep, sample.shape[0], eta, sample.device)
        return result(*transitions.advance(model_output, sample, rows, prev_sample, generator, source))

    return step
