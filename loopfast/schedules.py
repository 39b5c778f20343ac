"""From a diffusers scheduler to the table of transitions the ops work on.

Every first-order stochastic sampler draws ``x_{t-1} ~ N(a x_t + b m, sigma^2)`` with three numbers per step.
They are worked out here, once, in float64; nothing downstream knows which scheduler or prediction type they
came from.

Only torch is imported: schedulers are recognized by the name of their class and read through their
configuration.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

AUTO_SENSITIVITY_LIMIT = 8.0
"""``auto`` leaves out the steps whose sensitivity is above this many times the median."""

_DDIM = "DDIMScheduler"
_FLOW = "FlowMatchEulerDiscreteScheduler"


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
            table=table.to(self.table),
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


def transition_schedule(
    scheduler: Any, num_steps: int, eta: float | None = None, noise_level: float | None = None
) -> TransitionSchedule:
    """Work out the transitions of a scheduler.

    Args:
        scheduler: diffusers' ``DDIMScheduler`` (any prediction type and timestep spacing) or
            ``FlowMatchEulerDiscreteScheduler``. It is read, not changed.
        num_steps: number of sampling steps, T.
        eta: DDIM's noise, 0 (deterministic) to 1 (as much as DDPM, the default).
        noise_level: of the flow-matching SDE (Liu et al., "Flow-GRPO", 2025); 0.7 unless given.

    Returns:
        The schedule, on the CPU.

    Raises:
        ValueError: the scheduler or one of its options has no such transition, or an argument is out of range
            or belongs to the other kind of scheduler.
    """
    names = {base.__name__ for base in type(scheduler).__mro__}
    if _DDIM in names:
        if noise_level is not None:
            raise ValueError("noise_level belongs to flow matching; a DDIMScheduler takes eta")
        timesteps, table = _ddim(scheduler, num_steps, 1.0 if eta is None else eta)
        noiseless = _ddim(scheduler, num_steps, 0.0)[1]
    elif _FLOW in names:
        if eta is not None:
            raise ValueError(f"eta belongs to DDIM; a {_FLOW} takes noise_level")
        timesteps, table = _flow(scheduler, num_steps, 0.7 if noise_level is None else noise_level)
        noiseless = _flow(scheduler, num_steps, 0.0)[1]
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


def _refuse_options(scheduler: Any, options: dict[str, str]) -> None:
    for option, reason in options.items():
        if scheduler.config.get(option):
            raise ValueError(f"the scheduler's option {option}={scheduler.config[option]!r} {reason}")


def _with_timesteps(scheduler: Any, num_steps: int) -> Any:
    limit = scheduler.config["num_train_timesteps"]
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps must lie between 1 and {limit}, got {num_steps}")
    prepared = copy.deepcopy(scheduler)
    prepared.set_timesteps(num_steps)
    if len(prepared.timesteps) != num_steps:
        # Trailing spacing counts in floating point; 61 steps of 1000 come out as 62.
        raise ValueError(
            f"the scheduler makes {len(prepared.timesteps)} timesteps for num_steps={num_steps}; "
            "choose another number"
        )
    return prepared


def _ddim(scheduler: Any, num_steps: int, eta: float) -> tuple[Tensor, Tensor]:
    """Song et al., "Denoising diffusion implicit models", 2021, equations 12 and 16, solved for a and b."""
    nonlinear = "makes the mean nonlinear in the model output; set it to False"
    _refuse_options(scheduler, {"clip_sample": nonlinear, "thresholding": nonlinear})
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie between 0 and 1, got {eta}")

    prepared = _with_timesteps(scheduler, num_steps)
    timesteps = prepared.timesteps.to("cpu", torch.int64)
    # Where the step leads is given by the average stride, as in diffusers, whatever the next timestep is.
    previous = timesteps - scheduler.config["num_train_timesteps"] // num_steps
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
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
    return timesteps, torch.stack((a, b, sigma), dim=1)


def _flow(scheduler: Any, num_steps: int, noise_level: float) -> tuple[Tensor, Tensor]:
    """Liu et al., "Flow-GRPO", 2025: the SDE with the flow's marginals, in Euler-Maruyama steps."""
    _refuse_options(
        scheduler,
        {
            "invert_sigmas": "reverses time, which has no transition here",
            "stochastic_sampling": "is another sampler; set it to False",
            "use_dynamic_shifting": "makes the steps depend on the resolution, which is not supported",
        },
    )
    if noise_level < 0.0:
        raise ValueError(f"noise_level must not be negative, got {noise_level}")

    prepared = _with_timesteps(scheduler, num_steps)
    sigmas = prepared.sigmas.to("cpu", torch.float64)
    now, then = sigmas[:-1], sigmas[1:]
    stride = then - now
    # At pure noise (1 - s = 0) the noise would be infinite; it is taken at the end of the step.
    remaining = 1 - torch.where(now < 1, now, then)
    # q = noise_level sqrt(s / (1 - s)); q^2 / (2 s) has no s in it.
    drift = noise_level**2 / (2 * remaining)
    a = 1 + drift * stride
    b = (1 + drift * (1 - now)) * stride
    sigma = noise_level * (now / remaining * -stride).sqrt()
    return prepared.timesteps.to("cpu", torch.float32), torch.stack((a, b, sigma), dim=1)
