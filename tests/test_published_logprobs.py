"""The table and the op against what DDPO and Flow-GRPO publish: means, deviations, log-probabilities and gradients.

Both are written out here in float64 from their formulas. The drop-ins that replace the codebases' own functions are
tested in ``tests/integrations``.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from loopfast.schedules import TransitionSchedule, resolution_shift, transition_schedule
from loopfast_kernels import transition_logprob

LATENT = (4, 8, 8)
TOLERANCE = 1e-5
EPSILON = torch.finfo(torch.float32).eps
GUIDANCE = 5.0


def column(values: Tensor) -> Tensor:
    """One number a row, ready to meet ``[T, *LATENT]``."""
    return values.double().reshape(-1, 1, 1, 1)


def density(value: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Log-density of independent normals, averaged over a row's elements: the convention of both codebases."""
    squares = (value - mean).square() / deviation.square() / 2
    return -(squares + deviation.log() + math.log(2 * math.pi) / 2).flatten(1).mean(1)


def ddpo(scheduler: DDIMScheduler, eta: float, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every step of DDPO (Black et al., 2023, section 4.3), which samples by DDIM.

    By the posterior of the noising process: the clean image that the model's output stands for, and noise of the
    direction that is left of it. Their last step ends at timestep 0 whatever ``set_alpha_to_one`` says.
    """
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    cumulative = scheduler.alphas_cumprod.double()
    signal = column(cumulative[scheduler.timesteps])
    signal_then = column(cumulative[(scheduler.timesteps - stride).clamp(min=0)])
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        clean = (x - (1 - signal).sqrt() * m) / signal.sqrt()
    elif kind == "v_prediction":
        clean = signal.sqrt() * x - (1 - signal).sqrt() * m
    else:
        clean = m
    noise = (x - signal.sqrt() * clean) / (1 - signal).sqrt()
    variance = eta**2 * (1 - signal_then) * (signal_then - signal) / ((1 - signal) * signal_then)
    mean = signal_then.sqrt() * clean + (1 - signal_then - variance).clamp(min=0).sqrt() * noise
    return mean, variance.sqrt()


def flow_grpo(sigmas: Tensor, level: float, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every step of Flow-GRPO's SDE (Liu et al., 2025, equation 9).

    ``dx = (v - q^2/2 score) dt + q dw`` with the score of a rectified flow, ``-(x + (1 - t) v) / t``. Their code takes
    the noise of the first step, infinite at t = 1, at the next sigma.
    """
    t, duration = column(sigmas[:-1]), column(sigmas[:-1] - sigmas[1:])
    ahead = torch.where(t == 1, column(sigmas[1:2]), t)
    q = level * (t / (1 - ahead)).sqrt()
    score = -(x + (1 - t) * v) / t
    return x - (v - q**2 / 2 * score) * duration, q * duration.sqrt()


def check(schedule: TransitionSchedule, published, rows: Tensor) -> None:
    """Compare all steps at once, a row each: with guidance, on samples of a policy that has moved a little."""
    steps = len(schedule)
    x, unconditional, conditional, noise, moved = torch.randn(5, steps, *LATENT)
    halves = [half.double().requires_grad_() for half in (unconditional, conditional)]
    m = halves[0] + GUIDANCE * (halves[1] - halves[0])
    mean, deviation = published(x.double(), m)
    a, b, sigma = (column(part) for part in schedule.table64.unbind(1))
    m, mean_found = m.detach(), (a * x + b * m).detach()
    assert distance(mean_found[rows], mean.detach()[rows]) < 1e-9
    assert distance(sigma[rows], deviation[rows]) < 1e-9

    value = (mean + deviation * (noise + 0.1 * moved)).detach().float()
    expected = density(value.double(), mean, deviation)
    weights = torch.randn(steps, dtype=torch.float64)[rows]
    (expected[rows] * weights).sum().backward()
    for dtype, table in ((torch.float64, schedule.table64), (torch.float32, schedule.table)):
        inputs = [half.detach().to(dtype).requires_grad_() for half in halves]
        found = transition_logprob(
            inputs[1],
            x.to(dtype),
            value.to(dtype),
            table,
            torch.arange(steps),
            uncond_output=inputs[0],
            guidance_scale=GUIDANCE,
            reduction="mean",
        )
        (found[rows] * weights).sum().backward()
        for row in rows:
            # In float32 the residual, about one sigma, is the difference of terms of the size of a latent.
            terms = (a[row] * x[row]).abs() + (b[row] * m[row]).abs()
            rounding = float(EPSILON * terms.square().mean().sqrt() / sigma[row])
            tolerance = max(TOLERANCE, rounding) if dtype == torch.float32 else 1e-9
            assert abs(found[row] - expected[row]) < tolerance
            for ours, theirs in zip(inputs, halves, strict=True):
                assert distance(ours.grad[row], theirs.grad[row]) < tolerance


def distance(found: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference, in units of that of what is expected."""
    return float((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 50])
def test_ddpo(prediction, spacing, eta, steps):
    for to_one in (False, True):
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=to_one,
            prediction_type=prediction,
            timestep_spacing=spacing,
        )
        scheduler.set_timesteps(steps)
        schedule = transition_schedule(scheduler, steps, eta=eta)
        # deterministic steps have no density; the last one ends elsewhere with set_alpha_to_one
        rows = schedule.table64[:, 2].nonzero().flatten()
        rows = rows[rows < steps - 1] if to_one else rows
        assert len(rows) >= steps - 1
        check(schedule, lambda x, m, scheduler=scheduler: ddpo(scheduler, eta, x, m), rows)


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [4, 10, 40])
@pytest.mark.parametrize("case", ["plain", "static", "dynamic"])
def test_flow_grpo(level, steps, case):
    """Stable Diffusion 3 shifts by 3; FLUX by its resolution, from noise levels of its pipeline's."""
    options = {"plain": {}, "static": {"shift": 3.0}, "dynamic": {"use_dynamic_shifting": True}}[case]
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    given = {}
    if case == "dynamic":
        levels = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        given = {"sigmas": levels, "mu": resolution_shift(scheduler.config, 1024)}
    scheduler.set_timesteps(steps, **given)
    schedule = transition_schedule(scheduler, steps, noise_level=level, **given)
    sigmas = scheduler.sigmas.double()
    check(schedule, lambda x, v: flow_grpo(sigmas, level, x, v), torch.arange(steps))
