"""Computes the table of transitions that the ops work on from a diffusers scheduler.

Every first-order stochastic sampler draws ``x_{t-1} ~ N(a x_t + b m, sigma^2)`` with three numbers per step. They are
computed here, once, in float64; no other code depends on the scheduler or the prediction type.

Only torch is imported: schedulers are recognized by the name of their class and read through their configuration.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import short
from loopfast.system.memory import to_device

AUTO_SENSITIVITY_LIMIT = 8.0
"""``auto`` skips the steps whose sensitivity is above this multiple of the median."""

_DDIM = "DDIMScheduler"
_FLOW = "FlowMatchEulerDiscreteScheduler"

_Rule = tuple[Callable[[Any], bool], str]
"""A test of an option's value, and what is wrong with a value that fails it."""


def _one_of(*allowed: object) -> Callable[[Any], bool]:
    return lambda value: value in allowed


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int, most: int = 100_000) -> _Rule:
    def fits(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return fits, f"is not a whole number from {least} to {most:,}"


_OFF = _one_of(None, False)
_NONLINEAR = _OFF, "makes the mean nonlinear in the model output"
_OTHER_PROCESS = _OFF, "is of another process than the diffusion that DDIM samples"
_UNKNOWN = _OFF, "is not known here; remove it if the process is the same without it"
_SWITCH = (lambda value: value is None or isinstance(value, bool)), "is not true, false or null"
_BETA = (lambda value: _number(value) and 0 <= value < 1), "is not a number from 0 to below 1"

# Options that DDIM reads, and those with which a scheduler of the diffusion process samples another process than DDIM.
_DIFFUSION_RULES: dict[str, _Rule] = {
    "num_train_timesteps": _whole(1),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": (
        _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
        "is a noise schedule that DDIM does not know; linear, scaled_linear and squaredcos_cap_v2 are known",
    ),
    "trained_betas": (
        lambda value: (
            value is None
            or (isinstance(value, Sequence) and all(_number(beta) and 0 <= beta <= 1 for beta in value))
        ),
        "is not null or a list of numbers from 0 to 1",
    ),
    "steps_offset": _whole(0),
    "set_alpha_to_one": _SWITCH,
    "rescale_betas_zero_snr": _SWITCH,
    "clip_sample": _NONLINEAR,
    "thresholding": _NONLINEAR,
    "prediction_type": (
        _one_of("epsilon", "v_prediction", "sample"),
        "has no transition; epsilon, v_prediction and sample have",
    ),
    "variance_type": (
        _one_of(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "takes the variance from the model; here it is given by eta",
    ),
    "timestep_spacing": (
        _one_of("leading", "trailing", "linspace"),
        "is none of the spacings of DDIM: leading, trailing, linspace",
    ),
    "timestep_type": (
        _one_of("discrete"),
        "gives the model the logarithm of the noise level, not a timestep",
    ),
    "use_flow_sigmas": _OTHER_PROCESS,
    "use_dynamic_shifting": _OTHER_PROCESS,
    "shift_terminal": _OTHER_PROCESS,
}

# Options of the same schedulers that only choose another sampler's noise levels, and the values with DDIM's levels.
# DDIM replaces that sampler and takes its own levels; `replaced_by_ddim` reports it.
_LEVELS: dict[str, tuple[object, ...]] = {
    "interpolation_type": (None, "linear"),
    "final_sigmas_type": (None, "zero"),
    "lambda_min_clipped": (None, float("-inf")),
    "use_karras_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
    "use_lu_lambdas": (None, False),
}

# Options of the same schedulers that only choose how another sampler solves the same process.
_DIFFUSION_HARMLESS = frozenset(
    {
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "skip_prk_steps",
        "solver_order",
        "solver_type",
        "solver_p",
        "algorithm_type",
        "lower_order_final",
        "euler_at_final",
        "predict_x0",
        "disable_corrector",
        "sigma_min",
        "sigma_max",
        "flow_shift",
        "time_shift_type",
    }
)

_FLOW_RULES: dict[str, _Rule] = {
    "num_train_timesteps": _whole(1),
    "shift": ((lambda value: _number(value) and value > 0), "is not a number above 0"),
    "base_shift": (_number, "is not a number"),
    "max_shift": (_number, "is not a number"),
    "base_image_seq_len": _whole(1, 10_000_000),
    "max_image_seq_len": _whole(1, 10_000_000),
    "shift_terminal": (
        (lambda value: value is None or (_number(value) and 0 <= value < 1)),
        "is not null or a number from 0 to below 1",
    ),
    "use_dynamic_shifting": _SWITCH,
    "use_karras_sigmas": _SWITCH,
    "use_exponential_sigmas": _SWITCH,
    "invert_sigmas": (_OFF, "reverses time, which has no transition here"),
    "stochastic_sampling": (_OFF, "is another sampler; set it to False"),
    "use_beta_sigmas": (_OFF, "needs scipy, which is not among the requirements"),
    "time_shift_type": (_one_of("exponential", "linear"), "is none of exponential and linear"),
}

# A flow's sigma above this counts as pure noise: shifting sigma = 1 in float32 may round to its neighbour.
_PURE_NOISE = 1 - 1e-6


@dataclass(frozen=True)
class TransitionSchedule:
    """The steps of a sampler.

    Attributes:
        timesteps: ``[T]``, the model's input at each step; int64 for DDIM, float32 for flow matching.
        table: float32 ``[T, 3]``, columns a, b, sigma.
        table64: the same in float64, always on the CPU.
        sensitivity: float64 ``[T]`` on the CPU, ``(b / sigma)^2``: the strength of the log-probability's reaction to
            the model's output. 0 where sigma is 0.
        noiseless64: float64 ``[T, 3]`` on the CPU, the deterministic sampler's table of the same steps (sigma = 0).
            None for a schedule that was not made by `transition_schedule`.
    """

    timesteps: Tensor
    table: Tensor
    table64: Tensor
    sensitivity: Tensor
    noiseless64: Tensor | None = None

    def __len__(self) -> int:
        return self.table64.shape[0]

    def to(self, device: torch.device | str) -> TransitionSchedule:
        """Returns a copy with `timesteps` and `table` on a device."""
        return replace(self, timesteps=self.timesteps.to(device), table=self.table.to(device))

    def stochastic_in(self, start: int, stop: int) -> TransitionSchedule:
        """Returns a schedule whose steps outside ``[start, stop)`` are deterministic: sigma = 0, with its a and b.

        Args:
            start, stop: indices into the table, ``0 <= start < stop <= T``.

        Raises:
            ValueError: the indices are outside this range, or the deterministic table is not known.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"steps {start}:{stop} reach outside the schedule, which has {len(self)} steps")
        if self.noiseless64 is None:
            raise ValueError("the schedule does not know its deterministic steps")
        steps = torch.arange(len(self))
        inside = (steps >= start) & (steps < stop)
        table = torch.where(inside[:, None], self.table64, self.noiseless64)
        return replace(
            self,
            table=to_device(table, self.table.device, self.table.dtype),
            table64=table,
            sensitivity=torch.where(inside, self.sensitivity, 0.0),
        )

    def trained_steps(self, spec: str) -> tuple[int, ...]:
        """Picks the steps to train on. Deterministic steps (sigma = 0) are never among them.

        Args:
            spec: ``"all"``; ``"auto"``, all but those that would dominate the ratio and the gradient
                (`AUTO_SENSITIVITY_LIMIT`); or ``"start:stop"``, half open, either end may be missing.

        Returns:
            Indices into the table, ascending, at least one.

        Raises:
            ValueError: `spec` is malformed, reaches outside the schedule or picks no step.
        """
        stochastic = [index for index in range(len(self)) if self.table64[index, 2] > 0]
        if not stochastic:
            raise ValueError("every step is deterministic (sigma = 0): there is nothing to train on")
        if spec == "all":
            return tuple(stochastic)
        if spec == "auto":
            limit = AUTO_SENSITIVITY_LIMIT * self.sensitivity[stochastic].median()
            return tuple(index for index in stochastic if self.sensitivity[index] <= limit)
        match = re.fullmatch(r"(\d*):(\d*)", spec)
        if match is None:
            raise ValueError(f'steps must be "all", "auto" or "start:stop", got {spec!r}')
        start = int(match[1] or 0)
        stop = int(match[2] or len(self))
        if stop > len(self):
            raise ValueError(f"steps {spec!r} reaches outside the schedule, which has {len(self)} steps")
        chosen = tuple(index for index in stochastic if start <= index < stop)
        if not chosen:
            raise ValueError(f"steps {spec!r} picks no stochastic step of {len(self)}")
        return chosen


def refuse_unmapped(config: Mapping[str, Any], name: str) -> None:
    """Refuses the options of a scheduler that would be lost or mean something else in a transition table.

    It reads the configuration as the model's authors wrote it, because ``DDIMScheduler.from_config`` silently drops
    options that DDIM does not have. `replaced_by_ddim` reports dropped options that do not change the process.

    Its class has the ``name`` ``FlowMatchEulerDiscreteScheduler``, or is a sampler that DDIM replaces.

    Raises:
        ValueError: names the option, its value and what is wrong with it. An option that is not known here is
            refused unless it is null or false.
    """
    if name == _FLOW:
        _refuse(config, config, _FLOW_RULES)
    else:
        checked = [option for option in config if option not in _DIFFUSION_HARMLESS and option not in _LEVELS]
        _refuse(config, checked, _DIFFUSION_RULES)


def _refuse(config: Mapping[str, Any], options: Iterable[str], rules: Mapping[str, _Rule]) -> None:
    """Raises `ValueError` for the first of some options whose value breaks its rule."""
    for option in options:
        fits, fault = rules.get(option, _UNKNOWN)
        if option in config and not option.startswith("_") and not fits(config[option]):
            raise ValueError(f"the scheduler's option {option}={short(repr(config[option]))} {fault}")


def replaced_by_ddim(config: Mapping[str, Any], name: str) -> dict[str, object]:
    """Returns the options of a scheduler of class ``name`` that choose noise levels which DDIM does not have."""
    if name in (_DDIM, _FLOW):
        return {}
    return {option: config[option] for option in _LEVELS if config.get(option) not in _LEVELS[option]}


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Returns the shift ``mu`` of a flow-matching scheduler with ``use_dynamic_shifting``.

    It is linear in the number of tokens, as in diffusers' pipelines of FLUX and Stable Diffusion 3
    (``calculate_shift``).

    Args:
        config: the configuration of the ``FlowMatchEulerDiscreteScheduler``.
        tokens: the number of an image's tokens: ``(height / p) (width / p)`` for patches of p × p pixels.

    Raises:
        ValueError: the configuration does not determine a line.
    """
    shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    if shortest == longest:
        raise ValueError(
            f"the scheduler's options base_image_seq_len and max_image_seq_len are both {longest}: the shift between "
            "them is not determined"
        )
    return float(least + (most - least) * (tokens - shortest) / (longest - shortest))


def transition_schedule(
    scheduler: Any,
    num_steps: int,
    eta: float | None = None,
    noise_level: float | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> TransitionSchedule:
    """Computes the transitions of a scheduler.

    Args:
        scheduler: diffusers' ``DDIMScheduler`` (any prediction type and timestep spacing) or
            ``FlowMatchEulerDiscreteScheduler``. It is read, not changed.
        num_steps: the number of sampling steps, T.
        eta: DDIM's noise, 0 (deterministic) to 1 (as much as DDPM, the default).
        noise_level: the noise level of the flow-matching SDE (Liu et al., "Flow-GRPO", 2025); 0.7 by default.
        sigmas: flow matching's T noise levels before any shift, falling, in (0, 1]. None takes the scheduler's own.
            FLUX's pipeline gives ``linspace(1, 1 / T, T)``.
        mu: flow matching's shift with ``use_dynamic_shifting`` (`resolution_shift`); ignored without that option, as in
            diffusers.

    Returns:
        The schedule, on the CPU.

    Raises:
        ValueError: the scheduler or one of its options has no such transition, or an argument is out of range
            or belongs to the other kind of scheduler.
    """
    names = {base.__name__ for base in type(scheduler).__mro__}
    if _DDIM in names:
        given = {"noise_level": noise_level, "sigmas": sigmas, "mu": mu}
        for argument, value in given.items():
            if value is not None:
                raise ValueError(f"{argument} belongs to flow matching; a DDIMScheduler takes eta")
        _refuse(scheduler.config, ("clip_sample", "thresholding", "prediction_type"), _DIFFUSION_RULES)
        prepared = _prepared(scheduler, num_steps)
        timesteps = prepared.timesteps.to("cpu", torch.int64)
        table = _ddim(prepared, 1.0 if eta is None else eta)
        noiseless = _ddim(prepared, 0.0)
    elif _FLOW in names:
        if eta is not None:
            raise ValueError(f"eta belongs to DDIM; a {_FLOW} takes noise_level")
        prepared = _with_sigmas(scheduler, num_steps, sigmas, mu)
        timesteps = prepared.timesteps.to("cpu", torch.float32)
        table = _flow(prepared, 0.7 if noise_level is None else noise_level)
        noiseless = _flow(prepared, 0.0)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} has no Gaussian first-order transition here; supported are "
            f"{_FLOW} and {_DDIM} (for many models by {_DDIM}.from_config(scheduler.config))"
        )
    _, b, sigma = table.unbind(1)
    sensitivity = torch.where(sigma > 0, b / torch.where(sigma > 0, sigma, 1.0), 0.0).square()
    return TransitionSchedule(
        timesteps=timesteps,
        table=table.to(torch.float32),
        table64=table,
        sensitivity=sensitivity,
        noiseless64=noiseless,
    )


def _prepared(scheduler: Any, num_steps: int, **given: Any) -> Any:
    """Returns a copy of a scheduler, set to its steps."""
    limit = scheduler.config["num_train_timesteps"]
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps must lie between 1 and {limit}, got {num_steps}")
    prepared = copy.deepcopy(scheduler)
    prepared.set_timesteps(num_steps, **given)
    if len(prepared.timesteps) != num_steps:
        # Trailing spacing counts in floating point; 61 steps of 1000 come out as 62.
        raise ValueError(
            f"the scheduler makes {len(prepared.timesteps)} timesteps for num_steps={num_steps}; "
            "choose another number"
        )
    return prepared


def _with_sigmas(scheduler: Any, num_steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Any:
    """Returns a copy of a flow-matching scheduler, set to its steps."""
    sampling = ("invert_sigmas", "stochastic_sampling", "use_beta_sigmas", "time_shift_type")
    _refuse(scheduler.config, sampling, _FLOW_RULES)
    if scheduler.config.get("use_dynamic_shifting") and mu is None:
        raise ValueError(
            "the scheduler's option use_dynamic_shifting=True makes the steps depend on the resolution: "
            "mu is needed, which resolution_shift works out"
        )
    if sigmas is not None:
        sigmas = [float(sigma) for sigma in sigmas]
        if len(sigmas) != num_steps:
            raise ValueError(f"sigmas must be as many as the steps, {num_steps}; got {len(sigmas)}")
        _check_falling("sigmas", [*sigmas, 0.0])
    prepared = _prepared(scheduler, num_steps, sigmas=sigmas, mu=mu)
    _check_falling(f"the scheduler's sigmas for num_steps={num_steps}", prepared.sigmas.tolist())
    return prepared


def _check_falling(name: str, sigmas: Sequence[float]) -> None:
    if not (sigmas[0] <= 1 + 1e-6 and all(now > then for now, then in pairwise(sigmas))):
        shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:6]) + (", ..." if len(sigmas) > 6 else "")
        raise ValueError(f"{name} must fall strictly from at most 1 to 0, got {shown}")


def _ddim(prepared: Any, eta: float) -> Tensor:
    """Solves Song et al., "Denoising diffusion implicit models", 2021, equations 12 and 16, for a and b."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie between 0 and 1, got {eta}")
    timesteps, count = prepared.timesteps.to("cpu", torch.int64), prepared.config["num_train_timesteps"]
    # A step leads to the timestep one average stride below, as in diffusers, whatever the next timestep is.
    previous = timesteps - count // len(timesteps)
    alphas = prepared.alphas_cumprod.to("cpu", torch.float64)
    if len(alphas) != count:
        raise ValueError(
            f"the scheduler's option trained_betas has {len(alphas)} values for {count} timesteps (num_train_timesteps)"
        )
    if int(timesteps.max()) >= count:
        raise ValueError(
            f"steps_offset={prepared.config['steps_offset']} puts the first of {len(timesteps)} steps at timestep "
            f"{int(timesteps.max())}, beyond the model's {count}"
        )
    final = torch.as_tensor(prepared.final_alpha_cumprod, dtype=torch.float64, device="cpu")
    now = alphas[timesteps]
    then = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)

    # Rounding leaves differences that should be 0 slightly negative.
    variance = ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0.0)
    sigma = eta * variance.sqrt()
    direction = (1 - then - sigma**2).clamp(min=0.0).sqrt()

    prediction = prepared.config["prediction_type"]
    if prediction == "epsilon":
        if bool((now == 0).any()):
            raise ValueError(
                "prediction_type='epsilon' cannot start from a timestep that holds no signal "
                "(rescale_betas_zero_snr); v_prediction and sample can"
            )
        a = (then / now).sqrt()
        b = direction - (then * (1 - now) / now).sqrt()
    elif prediction == "v_prediction":
        a = (then * now).sqrt() + direction * (1 - now).sqrt()
        b = direction * now.sqrt() - (then * (1 - now)).sqrt()
    else:
        a = direction / (1 - now).sqrt()
        b = then.sqrt() - direction * (now / (1 - now)).sqrt()
    table = torch.stack((a, b, sigma), dim=1)
    if not bool(table.isfinite().all()):
        raise ValueError(
            "the scheduler's betas give transitions that are not finite: a timestep that is visited holds no noise "
            "or no signal"
        )
    return table


def _flow(prepared: Any, noise_level: float) -> Tensor:
    """Takes Euler-Maruyama steps of the SDE with the flow's marginals (Liu et al., "Flow-GRPO", 2025)."""
    if noise_level < 0.0:
        raise ValueError(f"noise_level must not be negative, got {noise_level}")
    sigmas = prepared.sigmas.to("cpu", torch.float64)
    now, then = sigmas[:-1], sigmas[1:]
    stride = then - now
    # At pure noise (1 - s = 0) the noise would be infinite; the sigma at the end of the step replaces it.
    remaining = 1 - torch.where(now < _PURE_NOISE, now, then)
    # q = noise_level sqrt(s / (1 - s)); q^2 / (2 s) has no s in it.
    drift = noise_level**2 / (2 * remaining)
    a = 1 + drift * stride
    b = (1 + drift * (1 - now)) * stride
    sigma = noise_level * (now / remaining * -stride).sqrt()
    return torch.stack((a, b, sigma), dim=1)
