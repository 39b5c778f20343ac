from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

# From its module: diffusers hides it where scipy is missing, which it needs to solve, not to be made.
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

from loopfast.schedules import (
    TransitionSchedule,
    refuse_unmapped,
    replaced_by_ddim,
    resolution_shift,
    transition_schedule,
)
from loopfast_kernels import denoise_step, philox_normal, transition_logprob
from tests.forks import printed

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


BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": torch.linspace(1e-4, 0.015, 1000).tolist()},
}


# The betas reach a table only as the product of what is left of the signal: two kinds meet every other option.
@pytest.mark.parametrize(
    ("prediction", "spacing", "betas"),
    [
        *product(
            ["epsilon", "v_prediction", "sample"],
            ["leading", "trailing", "linspace"],
            ["scaled_linear", "squaredcos_cap_v2"],
        ),
        ("v_prediction", "leading", "linear"),
        ("sample", "trailing", "trained_betas"),
    ],
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_option_agrees_with_diffusers_own_step(prediction, spacing, zero_snr, betas):
    """To 1e-5 of the result's root mean square; far closer to diffusers' own step computed in float64."""
    x, m, noise = torch.randn(3, 64)
    x64, m64, noise64 = x.double(), m.double(), noise.double()
    for to_one, offset in product([False, True], [0, 1] if spacing == "leading" else [0]):
        options = {
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": zero_snr,
            "set_alpha_to_one": to_one,
            "steps_offset": offset,
            **BETAS[betas],
        }
        single, double = ddim(**options), in_float64(ddim(**options))
        for steps, eta in product([1, 5, 50], [0.0, 0.5, 1.0]):
            single.set_timesteps(steps)
            double.set_timesteps(steps)
            if prediction == "epsilon" and single.alphas_cumprod[single.timesteps[0]] == 0:
                with pytest.raises(ValueError, match="timestep that holds no signal"):
                    transition_schedule(single, steps, eta=eta)
                continue
            schedule = transition_schedule(single, steps, eta=eta)
            assert torch.equal(schedule.timesteps, single.timesteps)
            for index in range(steps) if steps <= 5 else (0, 25, 49):
                t = schedule.timesteps[index]
                exact = double.step(m64, t, x64, eta=eta, variance_noise=noise64).prev_sample
                if not exact.isfinite().all():
                    # on some processors diffusers' 1 - alpha - sigma^2, which is 0, rounds to less, and its root is NaN
                    mean, deviation = ddim_mean_by_hand(double, prediction, eta, steps, int(t), x64, m64)
                    exact = mean + deviation * noise64
                a, b, sigma = schedule.table64[index]
                assert_within(1e-9, a * x64 + b * m64 + sigma * noise64, exact)
                a, b, sigma = schedule.table[index]
                found = a * x + b * m + sigma * noise
                assert_within(1e-6, found, exact)
                if eta == 1.0:
                    theirs = single.step(m, t, x, eta=eta, variance_noise=noise).prev_sample
                    # In float32 diffusers loses digits, or all of them, where it subtracts nearly equal numbers.
                    if distance(theirs, exact) < 9e-6:
                        assert_within(1e-5, found, theirs)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the root mean square."""
    return float((found.double() - expected).abs().max() / expected.double().square().mean().sqrt())


def assert_within(tolerance: float, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert distance(found, expected) <= tolerance


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_the_offset_is_of_leading_spacing_only(spacing):
    tables = [transition_schedule(ddim(timestep_spacing=spacing, steps_offset=n), 10).table for n in (0, 1)]
    assert torch.equal(*tables)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_ops_on_the_table_agree_with_diffusers_and_with_the_paper(prediction, spacing, eta):
    steps = 10
    options = {"prediction_type": prediction, "timestep_spacing": spacing}
    schedule = transition_schedule(ddim(**options), steps, eta=eta)
    theirs = in_float64(ddim(**options))
    theirs.set_timesteps(steps)

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


def flow(**options) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


DYNAMIC = {"use_dynamic_shifting": True}


def spread(steps: int) -> list[float]:
    """The noise levels that the pipeline of FLUX gives its scheduler."""
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()


FLOWS: dict[str, tuple[dict[str, Any], bool, float | None]] = {
    "plain": ({}, False, None),
    "static": ({"shift": 3.0}, False, None),
    "static, sigmas given": ({"shift": 3.1}, True, None),
    "dynamic": (DYNAMIC, False, 0.6),
    "dynamic, sigmas given": (DYNAMIC, True, 1.15),
    "dynamic, linear": ({**DYNAMIC, "time_shift_type": "linear"}, True, 2.0),
    "not dynamic, mu given": ({"shift": 1.0}, True, 1.15),
    "terminal": ({"shift_terminal": 0.1}, False, None),
    "dynamic, terminal": ({**DYNAMIC, "shift_terminal": 0.02}, True, 0.8),
    "karras": ({"use_karras_sigmas": True}, False, None),
    "exponential": ({"use_exponential_sigmas": True, "shift": 3.0}, False, None),
    "another range": ({"num_train_timesteps": 500, "shift": 5.0}, False, None),
}


@pytest.mark.parametrize("case", FLOWS)
def test_flow_without_noise_is_diffusers_euler_step(case):
    options, given, mu = FLOWS[case]
    scheduler = flow(**options)
    for steps in (1, 11):
        if steps == 1 and "shift_terminal" in options:  # divides by 1 - sigma = 0 in diffusers
            continue
        sigmas = spread(steps) if given else None
        schedule = transition_schedule(scheduler, steps, noise_level=0.0, sigmas=sigmas, mu=mu)
        theirs = flow(**options)
        theirs.set_timesteps(steps, sigmas=sigmas, mu=mu)
        assert schedule.timesteps.dtype == torch.float32
        assert torch.equal(schedule.timesteps, theirs.timesteps)
        # a deterministic step's b is the stride between two sigmas, exactly
        assert torch.equal(schedule.table64[:, 1], theirs.sigmas.double().diff())
        output, sample = torch.randn(2, 64)
        for index, t in enumerate(theirs.timesteps):
            a, b, sigma = schedule.table[index]
            assert sigma == 0
            assert_within(1e-6, a * sample + b * output, theirs.step(output, t, sample).prev_sample)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("case", FLOWS)
def test_flow_agrees_with_flow_grpo(case, noise_level):
    options, given, mu = FLOWS[case]
    output, sample = torch.randn(2, 64, dtype=torch.float64)
    for steps in (2, 11):
        sigmas = spread(steps) if given else None
        schedule = transition_schedule(flow(**options), steps, noise_level=noise_level, sigmas=sigmas, mu=mu)
        theirs = flow(**options)
        theirs.set_timesteps(steps, sigmas=sigmas, mu=mu)
        levels = theirs.sigmas.double().tolist()
        for index, (now, then) in enumerate(pairwise(levels)):
            # The step as Flow-GRPO's code writes it (sd3_sde_with_logprob.py).
            stride = then - now
            deviation = math.sqrt(now / (1 - (levels[1] if now == 1 else now))) * noise_level
            mean = (
                sample * (1 + deviation**2 / (2 * now) * stride)
                + output * (1 + deviation**2 * (1 - now) / (2 * now)) * stride
            )
            a, b, sigma = schedule.table64[index]
            assert_within(1e-6, a * sample + b * output, mean)
            assert sigma.item() == pytest.approx(deviation * math.sqrt(-stride), rel=1e-6)


@pytest.mark.parametrize("shift", [1.18, 1.43, 1.66])
def test_a_first_sigma_that_rounds_to_just_below_one_is_pure_noise(shift):
    scheduler = flow(shift=shift)
    scheduler.set_timesteps(4)
    assert 1 - 1e-6 < scheduler.sigmas[0] < 1
    schedule = transition_schedule(scheduler, 4, noise_level=0.7)
    # noise_level sqrt(s / (1 - s') (s - s')) with s = 1 and s' the next sigma
    assert schedule.table64[0, 2].item() == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 256),
        ({}, 1024),
        ({}, 4096),
        ({"base_shift": 0.3, "max_shift": 1.16, "max_image_seq_len": 6400}, 4096),
    ],
)
def test_the_shift_of_a_resolution_is_that_of_the_pipelines(options, tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = flow(**DYNAMIC, **options).config
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    expected = calculate_shift(tokens, *(config[name] for name in names))
    assert resolution_shift(config, tokens) == pytest.approx(expected, rel=1e-12)
    assert resolution_shift(options, tokens) == pytest.approx(expected, rel=1e-12)


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
        (
            flow(**DYNAMIC),
            {},
            "use_dynamic_shifting=True makes the steps depend on the resolution: mu is needed",
        ),
        (flow(), {"sigmas": [1.0, 0.5]}, "sigmas must be as many as the steps, 10; got 2"),
        (
            flow(),
            {"num_steps": 2, "sigmas": [0.5, 1.0]},
            "sigmas must fall strictly from at most 1 to 0, got 0.5, 1",
        ),
        (
            flow(),
            {"num_steps": 2, "sigmas": [1.5, 1.0]},
            "sigmas must fall strictly from at most 1 to 0, got 1.5, 1",
        ),
        (
            flow(),
            {"num_steps": 2, "sigmas": [1.0, 0.0]},
            "sigmas must fall strictly from at most 1 to 0, got 1, 0, 0",
        ),
        (flow(), {"num_steps": 2, "sigmas": [1.0, math.nan]}, "sigmas must fall strictly"),
        (
            flow(shift_terminal=0.1),
            {"num_steps": 1},
            "the scheduler's sigmas for num_steps=1 must fall strictly from at most 1 to 0, got nan, 0",
        ),
        (ddim(), {"sigmas": [1.0]}, "sigmas belongs to flow matching"),
        (ddim(), {"mu": 1.0}, "mu belongs to flow matching"),
        (
            ddim(trained_betas=[0.01] * 500),
            {},
            r"trained_betas has 500 values for 1000 timesteps \(num_train_timesteps\)",
        ),
        (ddim(beta_start=0.0, steps_offset=0), {}, "betas give transitions that are not finite"),
        (PNDMScheduler(), {}, r"PNDMScheduler has no .* DDIMScheduler.from_config\(scheduler.config\)"),
        (EulerDiscreteScheduler(), {}, "EulerDiscreteScheduler has no"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_what_has_no_transition_is_named(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        transition_schedule(scheduler, **({"num_steps": 10} | arguments))


def refusal(config: dict[str, Any], name: str) -> str:
    """Returns the reason why a configuration is refused; empty if it is not."""
    try:
        refuse_unmapped(config, name)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DDPMScheduler,
        PNDMScheduler,
        LMSDiscreteScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_every_option_of_the_schedulers_is_accounted_for(kind):
    config, name = dict(kind().config), kind.__name__
    if "clip_sample" in config:
        assert "clip_sample=True makes the mean nonlinear" in refusal(config, name)
        config["clip_sample"] = False
    assert refusal(config, name) == ""
    for option in config:
        assert "is not known here" not in refusal({**config, option: "another"}, name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample=True makes the mean nonlinear"),
        ("DDPMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding=True makes the mean"),
        (
            "DDPMScheduler",
            {"clip_sample": False, "variance_type": "learned_range"},
            "takes the variance from the model",
        ),
        (
            "DDPMScheduler",
            {"clip_sample": False, "beta_schedule": "sigmoid"},
            "is a noise schedule that DDIM does not",
        ),
        (
            "DDIMScheduler",
            {"clip_sample": False, "timestep_spacing": "log"},
            "is none of the spacings of DDIM",
        ),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "gives the model the logarithm"),
        ("UniPCMultistepScheduler", {"shift_terminal": 0.1}, "is of another process"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "is of another process"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "has no transition"),
        ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}, "is of another process"),
        ("PNDMScheduler", {"sigma_data": 0.5}, "is not known here; remove it if the process is the same"),
        ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}, "needs scipy"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "is another sampler"),
        ("FlowMatchEulerDiscreteScheduler", {"clip_sample": True}, "is not known here"),
    ],
)
def test_options_that_would_be_lost_are_refused_by_name(name, options, message):
    *_, (option, value) = options.items()
    with pytest.raises(ValueError, match=message) as error:
        refuse_unmapped(options, name)
    assert f"the scheduler's option {option}={value!r} " in str(error.value)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("EulerDiscreteScheduler", "use_karras_sigmas", True),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min"),
        ("LMSDiscreteScheduler", "use_exponential_sigmas", True),
        ("UniPCMultistepScheduler", "use_beta_sigmas", True),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
    ],
)
def test_another_samplers_noise_levels_are_replaced_and_reported(name, option, value):
    kind = LMSDiscreteScheduler if name == "LMSDiscreteScheduler" else getattr(diffusers, name)
    config = dict(kind().config)
    assert replaced_by_ddim(config, name) == {}
    config[option] = value
    refuse_unmapped(config, name)
    assert replaced_by_ddim(config, name) == {option: value}
    # left over from another sampler, of which DDIM's own file has no use
    assert replaced_by_ddim(config, "DDIMScheduler") == {}


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize(
    "value", ["1000", "", True, None, 0, -1, 1.5, 1000.0, math.nan, math.inf, 10**9, [1000], {"a": 1}]
)
def test_a_number_of_timesteps_that_is_none(name, value):
    with pytest.raises(ValueError, match=r"num_train_timesteps=.* is not a whole number from 1 to 100,000"):
        refuse_unmapped({"num_train_timesteps": value}, name)


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("PNDMScheduler", "beta_start", "0.00085", "='0.00085' is not a number from 0 to below 1"),
        ("DDIMScheduler", "beta_end", math.nan, "=nan is not a number from 0 to below 1"),
        ("DDIMScheduler", "beta_end", 1.0, "=1.0 is not a number from 0 to below 1"),
        ("DDIMScheduler", "beta_end", -1e-3, "=-0.001 is not a number"),
        ("DDIMScheduler", "beta_end", None, "=None is not a number"),
        ("DDIMScheduler", "trained_betas", "0.1", "='0.1' is not null or a list of numbers from 0 to 1"),
        ("DDIMScheduler", "trained_betas", [0.1, "0.2"], "is not null or a list of numbers from 0 to 1"),
        (
            "DDIMScheduler",
            "trained_betas",
            [0.1] * 99 + [2],
            "... is not null or a list of numbers from 0 to 1",
        ),
        ("DDIMScheduler", "trained_betas", {"a": 0.1}, "is not null or a list of numbers"),
        ("DDIMScheduler", "steps_offset", "1", "='1' is not a whole number from 0"),
        ("DDIMScheduler", "steps_offset", -1, "=-1 is not a whole number from 0"),
        ("DDIMScheduler", "set_alpha_to_one", "false", "='false' is not true, false or null"),
        ("DDIMScheduler", "rescale_betas_zero_snr", 1, "=1 is not true, false or null"),
        ("DDIMScheduler", "beta_schedule", None, "=None is a noise schedule that DDIM does not know"),
        ("DDIMScheduler", "prediction_type", ["epsilon"], "has no transition"),
        ("FlowMatchEulerDiscreteScheduler", "shift", "3.0", "='3.0' is not a number above 0"),
        ("FlowMatchEulerDiscreteScheduler", "shift", 0.0, "=0.0 is not a number above 0"),
        (
            "FlowMatchEulerDiscreteScheduler",
            "shift_terminal",
            1,
            "=1 is not null or a number from 0 to below 1",
        ),
        ("FlowMatchEulerDiscreteScheduler", "base_shift", "0.5", "='0.5' is not a number"),
        ("FlowMatchEulerDiscreteScheduler", "max_image_seq_len", 4096.5, "is not a whole number from 1"),
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", "false", "is not true, false or null"),
    ],
)
def test_values_of_the_wrong_kind_are_named(name, option, value, said):
    with pytest.raises(ValueError, match=f"the scheduler's option {option}=") as error:
        refuse_unmapped({option: value}, name)
    assert said in str(error.value)
    assert len(str(error.value)) < 200


def test_a_shift_by_resolution_needs_two_resolutions():
    with pytest.raises(ValueError, match="base_image_seq_len and max_image_seq_len are both 256"):
        resolution_shift({"base_image_seq_len": 256, "max_image_seq_len": 256}, 1024)


def test_options_of_the_solver_alone_are_harmless():
    # as published with SDXL, whose Euler scheduler has some of these options from another sampler
    options = {
        "_class_name": "EulerDiscreteScheduler",
        "clip_sample": False,
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "solver_order": 3,
        "steps_offset": 1,
        "trained_betas": None,
        "use_karras_sigmas": False,
        "timestep_values": None,
    }
    refuse_unmapped(options, "EulerDiscreteScheduler")


def test_only_torch_is_imported():
    program = """
import sys, torch
before = set(sys.modules)
import loopfast.schedules
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(brought - {"loopfast", "torch"} - set(sys.stdlib_module_names)))
"""
    assert printed(program).strip() == "[]"
