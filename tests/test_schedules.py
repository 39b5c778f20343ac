from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from loopfast.schedules import TransitionSchedule, transition_schedule
from loopfast_kernels import denoise_step, philox_normal, transition_logprob

SHAPE = (3, 4, 5, 5)


def ddim(**options) -> DDIMScheduler:
    defaults = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**(defaults | options))


def in_float64(scheduler: DDIMScheduler) -> DDIMScheduler:
    """The same schedule, with diffusers' own arithmetic carried out in double precision."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def gaussian_logprob(value: torch.Tensor, mean: torch.Tensor, sigma: float) -> torch.Tensor:
    density = -0.5 * ((value - mean) / sigma) ** 2 - math.log(sigma) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def ddim_mean_by_hand(scheduler, prediction: str, eta: float, steps: int, t: int, x, m) -> tuple:
    """Equations 12 and 16 of the DDIM paper, by way of x_0 and epsilon."""
    alphas = scheduler.alphas_cumprod.double()
    earlier = t - scheduler.config.num_train_timesteps // steps
    now = alphas[t].item()
    then = alphas[earlier].item() if earlier >= 0 else float(scheduler.final_alpha_cumprod)
    if prediction == "epsilon":
        noise = m
        clean = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
    elif prediction == "sample":
        clean = m
        noise = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
    else:
        clean = math.sqrt(now) * x - math.sqrt(1 - now) * m
        noise = math.sqrt(now) * m + math.sqrt(1 - now) * x
    sigma = eta * math.sqrt(max((1 - then) / (1 - now) * (1 - now / then), 0))
    return math.sqrt(then) * clean + math.sqrt(max(1 - then - sigma**2, 0)) * noise, sigma


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize(
    "options", [{}, {"set_alpha_to_one": True, "steps_offset": 0, "beta_schedule": "linear"}]
)
def test_ddim_agrees_with_diffusers_and_with_the_paper(prediction, spacing, eta, steps, options):
    options = {"prediction_type": prediction, "timestep_spacing": spacing} | options
    schedule = transition_schedule(ddim(**options), steps, eta=eta)
    theirs = in_float64(ddim(**options))
    theirs.set_timesteps(steps)
    assert torch.equal(schedule.timesteps, theirs.timesteps)

    seed = torch.arange(SHAPE[0])
    for index, t in enumerate(theirs.timesteps):
        output, sample = torch.randn(2, *SHAPE, dtype=torch.float64)
        step = torch.full((SHAPE[0],), index)
        noise = philox_normal(seed, step, SHAPE).double()
        prev, logprob = denoise_step(output, sample, schedule.table64, step, seed)
        expected = theirs.step(output, t, sample, eta=eta, variance_noise=noise).prev_sample
        mean, sigma = ddim_mean_by_hand(theirs, prediction, eta, steps, int(t), sample, output)
        torch.testing.assert_close(prev, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(prev, mean + sigma * noise, rtol=1e-6, atol=1e-6)
        if sigma > 0:
            scored = transition_logprob(output, sample, prev, schedule.table64, step)
            by_hand = gaussian_logprob(prev, mean, sigma)
            torch.testing.assert_close(scored, by_hand, rtol=1e-6, atol=1e-6)
            assert torch.equal(scored, logprob)
        else:
            assert not logprob.any()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_in_float32_loses_nothing_but_the_last_bits(prediction):
    schedule = transition_schedule(ddim(prediction_type=prediction), 10)
    single, double = ddim(prediction_type=prediction), in_float64(ddim(prediction_type=prediction))
    single.set_timesteps(10)
    double.set_timesteps(10)
    seed = torch.arange(SHAPE[0])
    for index, t in enumerate(schedule.timesteps):
        output, sample = torch.randn(2, *SHAPE)
        step = torch.full((SHAPE[0],), index)
        noise = philox_normal(seed, step, SHAPE)
        prev, logprob = denoise_step(output, sample, schedule.table, step, seed)
        theirs = single.step(output, t, sample, eta=1.0, variance_noise=noise).prev_sample
        exact = double.step(
            output.double(), t, sample.double(), eta=1.0, variance_noise=noise.double()
        ).prev_sample
        torch.testing.assert_close(prev.double(), exact, rtol=1e-6, atol=1e-6)
        # diffusers divides by small numbers on the way, which costs it a digit at the last steps.
        torch.testing.assert_close(prev, theirs, rtol=0, atol=2e-5)
        # The residual is the noise itself, up to the rounding of the latents over sigma.
        expected = gaussian_logprob(noise.double(), torch.zeros(()), 1.0) - schedule.table64[index, 2].log()
        torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_starts_from_pure_noise(prediction):
    options = {
        "prediction_type": prediction,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }
    schedule = transition_schedule(ddim(**options), 10)
    theirs = in_float64(ddim(**options))
    theirs.set_timesteps(10)
    assert theirs.alphas_cumprod[theirs.timesteps[0]] == 0
    output, sample, noise = torch.randn(3, *SHAPE, dtype=torch.float64)
    for index, t in enumerate(theirs.timesteps):
        a, b, sigma = schedule.table64[index]
        expected = theirs.step(output, t, sample, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(a * sample + b * output + sigma * noise, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}]
)
def test_flow_without_noise_is_diffusers_euler_step(options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    schedule = transition_schedule(scheduler, 8, noise_level=0.0)
    scheduler.set_timesteps(8)
    assert schedule.timesteps.dtype == torch.float32
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    output, sample = torch.randn(2, *SHAPE)
    for index, t in enumerate(scheduler.timesteps):
        a, b, sigma = schedule.table[index]
        assert sigma == 0
        expected = scheduler.step(output, t, sample).prev_sample
        torch.testing.assert_close(a * sample + b * output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 28])
def test_flow_agrees_with_flow_grpo(noise_level, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = transition_schedule(scheduler, steps, noise_level=noise_level)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().tolist()
    assert sigmas[0] == 1.0
    output, sample = torch.randn(2, *SHAPE, dtype=torch.float64)
    for index, (now, then) in enumerate(pairwise(sigmas)):
        # The step as Flow-GRPO's code writes it (sd3_sde_with_logprob.py).
        stride = then - now
        deviation = math.sqrt(now / (1 - (sigmas[1] if now == 1 else now))) * noise_level
        mean = (
            sample * (1 + deviation**2 / (2 * now) * stride)
            + output * (1 + deviation**2 * (1 - now) / (2 * now)) * stride
        )
        a, b, sigma = schedule.table64[index]
        torch.testing.assert_close(a * sample + b * output, mean, rtol=1e-6, atol=1e-6)
        assert sigma.item() == pytest.approx(deviation * math.sqrt(-stride), rel=1e-6)


def test_defaults_of_the_noise():
    assert torch.equal(transition_schedule(ddim(), 10).table, transition_schedule(ddim(), 10, eta=1.0).table)
    flow = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(
        transition_schedule(flow, 10).table, transition_schedule(flow, 10, noise_level=0.7).table
    )


def test_the_scheduler_is_left_as_it_was():
    scheduler = ddim()
    scheduler.set_timesteps(7)
    transition_schedule(scheduler, 10)
    assert scheduler.num_inference_steps == 7
    assert len(scheduler.timesteps) == 7


def test_a_subclass_is_recognized():
    class Custom(DDIMScheduler):
        pass

    scheduler = Custom.from_config(ddim().config)
    assert torch.equal(transition_schedule(scheduler, 10).table, transition_schedule(ddim(), 10).table)


def test_sensitivity_singles_out_the_pathological_step():
    schedule = transition_schedule(ddim(), 10)
    _, b, sigma = schedule.table64.unbind(1)
    torch.testing.assert_close(schedule.sensitivity, (b / sigma) ** 2)
    assert schedule.sensitivity.argmax() == 8
    assert schedule.sensitivity[8] > 40 * schedule.sensitivity.median()
    assert schedule.trained_steps("auto") == (0, 1, 2, 3, 4, 5, 6, 7, 9)


def synthetic(sigma: list[float], slope: list[float]) -> TransitionSchedule:
    deviation = torch.tensor(sigma, dtype=torch.float64)
    table = torch.stack(
        (torch.ones_like(deviation), torch.tensor(slope, dtype=torch.float64) * deviation, deviation), dim=1
    )
    sensitivity = torch.where(deviation > 0, torch.tensor(slope, dtype=torch.float64) ** 2, 0.0)
    return TransitionSchedule(torch.arange(len(sigma)), table.float(), table, sensitivity)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("all", (0, 1, 2, 4)),
        ("auto", (0, 1, 4)),
        ("0:2", (0, 1)),
        (":3", (0, 1, 2)),
        ("2:", (2, 4)),
        (":", (0, 1, 2, 4)),
        ("3:5", (4,)),
    ],
)
def test_trained_steps(spec, steps):
    assert synthetic([1, 1, 1, 0, 1], [1, 2, 6, 1, 1]).trained_steps(spec) == steps


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("most", "steps must be"),
        ("1:2:3", "steps must be"),
        ("-2:", "steps must be"),
        ("2", "steps must be"),
        ("0:6", "reaches outside the schedule, which has 5 steps"),
        ("3:2", "picks no stochastic step"),
        ("3:4", "picks no stochastic step"),
    ],
)
def test_trained_steps_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        synthetic([1, 1, 1, 0, 1], [1, 1, 1, 1, 1]).trained_steps(spec)


def test_a_deterministic_schedule_cannot_be_trained_on():
    with pytest.raises(ValueError, match="every step is deterministic"):
        transition_schedule(ddim(), 10, eta=0.0).trained_steps("all")


def test_moving_to_a_device_takes_what_the_ops_need():
    schedule = transition_schedule(ddim(), 10)
    moved = schedule.to("meta")
    assert (moved.timesteps.device.type, moved.table.device.type) == ("meta", "meta")
    assert moved.trained_steps("all") == schedule.trained_steps("all")
    assert len(moved) == 10
    assert schedule.table.device.type == "cpu"


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (ddim(clip_sample=True), {}, "clip_sample=True makes the mean nonlinear"),
        (ddim(thresholding=True), {}, "thresholding=True makes the mean nonlinear"),
        (ddim(prediction_type="flow"), {}, "prediction_type='flow' has no transition"),
        (
            ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            {},
            "prediction_type='epsilon' cannot start from a timestep that holds no signal",
        ),
        (ddim(steps_offset=200), {}, "steps_offset=200 puts the first of 10 steps at timestep 1100"),
        (ddim(), {"num_steps": 0}, "num_steps must lie between 1 and 1000, got 0"),
        (ddim(), {"num_steps": 1001}, "num_steps must lie between 1 and 1000, got 1001"),
        (ddim(timestep_spacing="trailing"), {"num_steps": 61}, "makes 62 timesteps for num_steps=61"),
        (ddim(), {"eta": -0.1}, "eta must lie between 0 and 1, got -0.1"),
        (ddim(), {"eta": 1.5}, "eta must lie between 0 and 1, got 1.5"),
        (ddim(), {"noise_level": 0.7}, "noise_level belongs to flow matching"),
        (FlowMatchEulerDiscreteScheduler(), {"eta": 1.0}, "eta belongs to DDIM"),
        (FlowMatchEulerDiscreteScheduler(), {"noise_level": -1.0}, "noise_level must not be negative"),
        (FlowMatchEulerDiscreteScheduler(), {"num_steps": 0}, "num_steps must lie between"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "invert_sigmas=True reverses time"),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            {},
            "stochastic_sampling=True is another",
        ),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, "use_dynamic_shifting=True makes"),
        (PNDMScheduler(), {}, r"PNDMScheduler has no .* DDIMScheduler.from_config\(scheduler.config\)"),
        (EulerDiscreteScheduler(), {}, "EulerDiscreteScheduler has no"),
    ],
)
def test_what_has_no_transition_is_named(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        transition_schedule(scheduler, **({"num_steps": 10} | arguments))


def test_only_torch_is_imported():
    program = """
import sys, torch
before = set(sys.modules)
import loopfast.schedules
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(brought - {"loopfast", "torch"} - set(sys.stdlib_module_names)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
