"""From a diffusers scheduler to the table of transitions the ops work on.

Every first-order stochastic sampler draws ``x_{t-1} ~ N(a x_t + b m, sigma^2)`` with three numbers per step.
They are worked out here, once, in float64; nothing downstream knows which scheduler or prediction type they
came from.

Only torch is imported: schedulers are recognized by the name of their class and read through their
configuration.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import short
from loopfast.system.memory import to_device

AUTO_SENSITIVITY_LIMIT = 8.0
"""``auto`` leaves out the steps whose sensitivity is above this many times the median."""

_DDIM = "DDIMScheduler"
_FLOW = "FlowMatchEulerDiscreteScheduler"

_OFF = (None, False)
_NONLINEAR = "makes the mean nonlinear in the model output"
_OTHER_PROCESS = "is of another process than the diffusion that DDIM samples"

# Of the schedulers of the diffusion process, options that change what DDIM would sample: the values that do not, and
# what is wrong with others.
_DIFFUSION_OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "clip_sample": (_OFF, _NONLINEAR),
    "thresholding": (_OFF, _NONLINEAR),
    "beta_schedule": (
        ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "is a noise schedule that DDIM does not know; linear, scaled_linear and squaredcos_cap_v2 are known",
    ),
    "prediction_type": (
        ("epsilon", "v_prediction", "sample"),
        "has no transition; epsilon, v_prediction and sample have",
    ),
    "variance_type": (
        (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "takes the variance from the model; here it is given by eta",
    ),
    "timestep_spacing": (
        ("leading", "trailing", "linspace"),
        "is none of the spacings of DDIM: leading, trailing, linspace",
    ),
    "timestep_type": (("discrete",), "gives the model the logarithm of the noise level, not a timestep"),
    "use_flow_sigmas": (_OFF, _OTHER_PROCESS),
    "use_dynamic_shifting": (_OFF, _OTHER_PROCESS),
    "shift_terminal": (_OFF, _OTHER_PROCESS),
}

# Of the same schedulers, options that only say at which noise levels another sampler takes its steps, and the values
# that DDIM agrees with. DDIM takes that sampler's place, with levels of its own; `replaced_by_ddim` says so.
_LEVELS: dict[str, tuple[object, ...]] = {
    "interpolation_type": (None, "linear"),
    "final_sigmas_type": (None, "zero"),
    "lambda_min_clipped": (None, float("-inf")),
    "use_karras_sigmas": _OFF,
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "use_lu_lambdas": _OFF,
}

# Of the same schedulers, what DDIM reads, and what only says how another sampler solves the same process.
_DIFFUSION_HARMLESS = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "trained_betas",
        "set_alpha_to_one",
        "steps_offset",
        "rescale_betas_zero_snr",
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

_FLOW_OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "invert_sigmas": (_OFF, "reverses time, which has no transition here"),
    "stochastic_sampling": (_OFF, "is another sampler; set it to False"),
    "use_beta_sigmas": (_OFF, "needs scipy, which is not among the requirements"),
    "time_shift_type": (("exponential", "linear"), "is none of exponential and linear"),
}
_FLOW_HARMLESS = frozenset(
    {
        "num_train_timesteps",
        "shift",
        "use_dynamic_shifting",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
        "shift_terminal",
        "use_karras_sigmas",
        "use_exponential_sigmas",
    }
)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int, most: int = 100_000) -> tuple[Callable[[object], bool], str]:
    def fits(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return fits, f"a whole number from {least} to {most:,}"


_SWITCH = (lambda value: value is None or isinstance(value, bool)), "true, false or null"
_BETA = (lambda value: _number(value) and 0 <= value < 1), "a number from 0 to below 1"

# Options of DDIM and of the flow that are numbers, lists of them or switches: whether a value fits, and what does.
_DIFFUSION_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": _whole(1),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "trained_betas": (
        lambda value: (
            value is None
            or (isinstance(value, Sequence) and all(_number(beta) and 0 <= beta <= 1 for beta in value))
        ),
        "null or a list of numbers from 0 to 1",
    ),
    "steps_offset": _whole(0),
    "set_alpha_to_one": _SWITCH,
    "rescale_betas_zero_snr": _SWITCH,
}
_FLOW_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_timesteps": _whole(1),
    "shift": ((lambda value: _number(value) and value > 0), "a number above 0"),
    "base_shift": (_number, "a number"),
    "max_shift": (_number, "a number"),
    "base_image_seq_len": _whole(1, 10_000_000),
    "max_image_seq_len": _whole(1, 10_000_000),
    "shift_terminal": (
        (lambda value: value is None or (_number(value) and 0 <= value < 1)),
        "null or a number from 0 to below 1",
    ),
    "use_dynamic_shifting": _SWITCH,
    "use_karras_sigmas": _SWITCH,
    "use_exponential_sigmas": _SWITCH,
}

# Above this a flow's sigma counts as pure noise: shifting sigma = 1 in float32 may round to its neighbour.
_PURE_NOISE = 1 - 1e-6


@dataclass(frozen=True)
class TransitionSchedule:
    """The steps of a sampler.

    Attributes:
        timesteps: ``[T]``, what the model is given at each step; int64 for DDIM, float32 for flow matching.
        table: float32 ``[T, 3]``, columns a, b, sigma.
        table64: the same in float64, always on the CPU.
        sensitivity: float64 ``[T]`` on the CPU, ``(b / sigma)^2``: how strongly the log-probability reacts to
            the model's output. 0 where sigma is 0.
        noiseless64: float64 ``[T, 3]`` on the CPU, the table of the same steps without noise (sigma = 0): the
            deterministic sampler's. None for a schedule that was not made by `transition_schedule`.
    """

    timesteps: Tensor
    table: Tensor
    table64: Tensor
    sensitivity: Tensor
    noiseless64: Tensor | None = None

    def __len__(self) -> int:
        return self.table64.shape[0]

    def to(self, device: torch.device | str) -> TransitionSchedule:
        """Copy with `timesteps` and `table` on a device."""
        return replace(self, timesteps=self.timesteps.to(device), table=self.table.to(device))

    def stochastic_in(self, start: int, stop: int) -> TransitionSchedule:
        """The same steps, those outside ``[start, stop)`` being deterministic: sigma = 0, and a and b that fit it.

        Args:
            start, stop: indices into the table, ``0 <= start < stop <= T``.

        Raises:
            ValueError: they are not, or the deterministic table is not known.
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
        """Pick the steps to train on. Deterministic ones (sigma = 0) never are.

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
    """Refuse the options of a scheduler that would be lost or mean something else in a transition table.

    For the configuration as the model's authors wrote it: ``DDIMScheduler.from_config`` drops what DDIM does not
    have, silently. What it drops without changing the process, `replaced_by_ddim` reports.

    Args:
        config: a scheduler's configuration, such as the content of ``scheduler_config.json``.
        name: the scheduler's class: ``FlowMatchEulerDiscreteScheduler``, or else a sampler of the diffusion process, to
            be replaced by DDIM.

    Raises:
        ValueError: names the option, its value and what is wrong with it. An option that is not known here is
            refused unless it is null or false.
    """
    flow = name == _FLOW
    options, harmless = (
        (_FLOW_OPTIONS, _FLOW_HARMLESS) if flow else (_DIFFUSION_OPTIONS, _DIFFUSION_HARMLESS | set(_LEVELS))
    )
    values = _FLOW_VALUES if flow else _DIFFUSION_VALUES
    for option, value in config.items():
        if option in values and not values[option][0](value):
            raise ValueError(
                f"the scheduler's option {option}={short(repr(value))} is not {values[option][1]}"
            )
        if option.startswith("_") or option in harmless:
            continue
        allowed, reason = options.get(
            option, (_OFF, "is not known here; remove it if the process is the same without it")
        )
        if value not in allowed:
            raise ValueError(f"the scheduler's option {option}={short(repr(value))} {reason}")


def replaced_by_ddim(config: Mapping[str, Any], name: str) -> dict[str, object]:
    """The options that say at which noise levels a sampler takes its steps, and that DDIM does not have.

    Args:
        config: a scheduler's configuration.
        name: the scheduler's class; ``DDIMScheduler`` and the flow's have none of these options.
    """
    if name in (_DDIM, _FLOW):
        return {}
    return {option: config[option] for option in _LEVELS if config.get(option) not in _LEVELS[option]}


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift ``mu`` of a flow-matching scheduler with ``use_dynamic_shifting``.

    Linear in the number of tokens, as the pipelines of FLUX and Stable Diffusion 3 have it in diffusers
    (``calculate_shift``).

    Args:
        config: of the ``FlowMatchEulerDiscreteScheduler``.
        tokens: of an image in the transformer: ``(height / p) (width / p)`` with p pixels to a patch's side.

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
    """Work out the transitions of a scheduler.

    Args:
        scheduler: diffusers' ``DDIMScheduler`` (any prediction type and timestep spacing) or
            ``FlowMatchEulerDiscreteScheduler``. It is read, not changed.
        num_steps: number of sampling steps, T.
        eta: DDIM's noise, 0 (deterministic) to 1 (as much as DDPM, the default).
        noise_level: of the flow-matching SDE (Liu et al., "Flow-GRPO", 2025); 0.7 unless given.
        sigmas: of flow matching, the T noise levels before any shift, falling, in (0, 1]; None: the scheduler's own.
            FLUX's pipeline gives ``linspace(1, 1 / T, T)``.
        mu: of flow matching with ``use_dynamic_shifting``, the shift (`resolution_shift`); without that option it is
            not used, as in diffusers.

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
        timesteps, table = _ddim(scheduler, num_steps, 1.0 if eta is None else eta)
        noiseless = _ddim(scheduler, num_steps, 0.0)[1]
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


def _refuse(scheduler: Any, options: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    for option, (allowed, reason) in options.items():
        if option in scheduler.config and scheduler.config[option] not in allowed:
            raise ValueError(f"the scheduler's option {option}={scheduler.config[option]!r} {reason}")


def _check_count(scheduler: Any, num_steps: int) -> None:
    limit = scheduler.config["num_train_timesteps"]
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps must lie between 1 and {limit}, got {num_steps}")


def _with_timesteps(scheduler: Any, num_steps: int) -> Any:
    """A copy of a DDIM scheduler, set to its steps."""
    _check_count(scheduler, num_steps)
    prepared = copy.deepcopy(scheduler)
    prepared.set_timesteps(num_steps)
    if len(prepared.timesteps) != num_steps:
        # Trailing spacing counts in floating point; 61 steps of 1000 come out as 62.
        raise ValueError(
            f"the scheduler makes {len(prepared.timesteps)} timesteps for num_steps={num_steps}; "
            "choose another number"
        )
    return prepared


def _with_sigmas(scheduler: Any, num_steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Any:
    """A copy of a flow-matching scheduler, set to its steps."""
    _refuse(scheduler, _FLOW_OPTIONS)
    _check_count(scheduler, num_steps)
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
    prepared = copy.deepcopy(scheduler)
    prepared.set_timesteps(num_steps, sigmas=sigmas, mu=mu)
    _check_falling(f"the scheduler's sigmas for num_steps={num_steps}", prepared.sigmas.tolist())
    return prepared


def _check_falling(name: str, sigmas: Sequence[float]) -> None:
    if not (sigmas[0] <= 1 + 1e-6 and all(now > then for now, then in pairwise(sigmas))):
        shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:6]) + (", ..." if len(sigmas) > 6 else "")
        raise ValueError(f"{name} must fall strictly from at most 1 to 0, got {shown}")


def _ddim(scheduler: Any, num_steps: int, eta: float) -> tuple[Tensor, Tensor]:
    """Song et al., "Denoising diffusion implicit models", 2021, equations 12 and 16, solved for a and b."""
    _refuse(scheduler, {name: _DIFFUSION_OPTIONS[name] for name in ("clip_sample", "thresholding")})
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie between 0 and 1, got {eta}")

    prepared = _with_timesteps(scheduler, num_steps)
    timesteps = prepared.timesteps.to("cpu", torch.int64)
    # Where the step leads is given by the average stride, as in diffusers, whatever the next timestep is.
    previous = timesteps - scheduler.config["num_train_timesteps"] // num_steps
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    if len(alphas) != scheduler.config["num_train_timesteps"]:
        raise ValueError(
            f"the scheduler's option trained_betas has {len(alphas)} values for "
            f"{scheduler.config['num_train_timesteps']} timesteps (num_train_timesteps)"
        )
    if int(timesteps.max()) >= len(alphas):
        raise ValueError(
            f"steps_offset={scheduler.config['steps_offset']} puts the first of {num_steps} steps at "
            f"timestep {int(timesteps.max())}, beyond the model's {len(alphas)}"
        )
    final = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float64, device="cpu")
    now = alphas[timesteps]
    then = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)

    # Rounding leaves differences that should be 0 slightly negative.
    variance = ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0.0)
    sigma = eta * variance.sqrt()
    direction = (1 - then - sigma**2).clamp(min=0.0).sqrt()

    prediction = scheduler.config["prediction_type"]
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
    elif prediction == "sample":
        a = direction / (1 - now).sqrt()
        b = then.sqrt() - direction * (now / (1 - now)).sqrt()
    else:
        raise ValueError(
            f"prediction_type={prediction!r} has no transition; known: epsilon, v_prediction, sample"
        )
    table = torch.stack((a, b, sigma), dim=1)
    if not bool(table.isfinite().all()):
        raise ValueError(
            "the scheduler's betas give transitions that are not finite: a timestep that is visited holds no noise "
            "or no signal"
        )
    return timesteps, table


def _flow(prepared: Any, noise_level: float) -> Tensor:
    """Liu et al., "Flow-GRPO", 2025: the SDE with the flow's marginals, in Euler-Maruyama steps."""
    if noise_level < 0.0:
        raise ValueError(f"noise_level must not be negative, got {noise_level}")
    sigmas = prepared.sigmas.to("cpu", torch.float64)
    now, then = sigmas[:-1], sigmas[1:]
    stride = then - now
    # At pure noise (1 - s = 0) the noise would be infinite; it is taken at the end of the step.
    remaining = 1 - torch.where(now < _PURE_NOISE, now, then)
    # q = noise_level sqrt(s / (1 - s)); q^2 / (2 s) has no s in it.
    drift = noise_level**2 / (2 * remaining)
    a = 1 + drift * stride
    b = (1 + drift * (1 - now)) * stride
    sigma = noise_level * (now / remaining * -stride).sqrt()
    return torch.stack((a, b, sigma), dim=1)
