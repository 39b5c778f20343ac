"""Flow-GRPO is no package of a registry: its formula stands here in float64, under the names it has there."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.distributions import Normal

from loopfast.errors import LoopfastError
from loopfast.integrations import patch_flow_grpo
from loopfast.integrations.flow_grpo import make_schedule
from loopfast.schedules import transition_schedule

SHAPE = (3, 4, 5, 6)
ROOM = "flow_grpo.diffusers_patch"
SOLVER = f"{ROOM}.solver"


def formula(x, velocity, sigmas, index, noise_level, prev_sample, generator):
    """The SDE of Flow-GRPO's paper in one Euler-Maruyama step; at sigma = 1 its noise is that of the next sigma."""
    now, then = (sigmas[i].reshape(-1, *[1] * (x.dim() - 1)) for i in (index, index + 1))
    spread = noise_level * (now / (1 - torch.where(now == 1, sigmas[1], now))).sqrt()
    score = -(x + (1 - now) * velocity) / now
    mean = x + (velocity - spread**2 / 2 * score) * (then - now)
    duration = (now - then).sqrt()
    if prev_sample is None:
        drawn = randn_tensor(x.shape, generator=generator, dtype=torch.float32)
        prev_sample = mean + spread * duration * drawn
    logprob = Normal(mean, spread * duration, validate_args=False).log_prob(prev_sample.detach())
    return prev_sample, logprob.flatten(1).mean(1), mean, spread, duration


def sde_step_with_logprob(
    self,
    model_output,
    timestep,
    sample,
    noise_level=0.7,
    prev_sample=None,
    generator=None,
    sde_type="sde",
    return_sqrt_dt=False,
):
    index = torch.tensor([self.index_for_timestep(t) for t in timestep])
    result = formula(
        sample.double(),
        model_output.double(),
        self.sigmas.double(),
        index,
        noise_level,
        prev_sample,
        generator,
    )
    return result if return_sqrt_dt else result[:-1]


def flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator=None):
    x, velocity, levels = latents.double(), model_output.double(), sigmas.double()
    result = formula(x, velocity, levels, torch.tensor([index]), eta, prev_sample, generator)
    return result[0], x - levels[index] * velocity, result[1]


@pytest.fixture
def codebase(monkeypatch) -> ModuleType:
    """The module that defines the function, beside the solver and a script that has imported the function."""
    definer, solver, script = (
        ModuleType(f"{ROOM}.sd3_sde_with_logprob"),
        ModuleType(SOLVER),
        ModuleType("train"),
    )
    definer.sde_step_with_logprob, definer.randn_tensor = sde_step_with_logprob, randn_tensor
    solver.flow_grpo_step = flow_grpo_step
    script.sde_step_with_logprob = sde_step_with_logprob
    for module in (definer, solver, script):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return definer


@pytest.fixture
def original():
    """The formulas, out of a patch's reach: not in a module."""
    return [sde_step_with_logprob, flow_grpo_step]


def flow(steps: int = 10, **options) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | options))
    scheduler.set_timesteps(steps)
    return scheduler


def flux(steps: int = 10) -> FlowMatchEulerDiscreteScheduler:
    """Given its sigmas and its shift, as the pipelines of FLUX and Qwen-Image do."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=0.9)
    return scheduler


def latents(count: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    return torch.randn(count, *SHAPE).to(device, dtype).unbind()


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert [part.dtype for part in found] == [torch.float32] * len(expected)
    for part, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double(), exact.double(), rtol=1e-5, atol=1e-5)


def test_replaces_the_functions_where_they_are_bound_and_restores_them(codebase, original):
    script, solver = sys.modules["train"], sys.modules[SOLVER]
    with patch_flow_grpo():
        assert script.sde_step_with_logprob is codebase.sde_step_with_logprob is not original[0]
        assert solver.flow_grpo_step is not original[1]
    assert script.sde_step_with_logprob is codebase.sde_step_with_logprob is original[0]
    assert solver.flow_grpo_step is original[1]


@pytest.mark.parametrize("solver", [None, ModuleType(SOLVER)])
def test_a_version_without_the_solver_is_patched_too(codebase, original, monkeypatch, solver):
    monkeypatch.delitem(sys.modules, SOLVER)
    if solver is not None:
        monkeypatch.setitem(sys.modules, SOLVER, solver)
    with patch_flow_grpo():
        assert codebase.sde_step_with_logprob is not original[0]


@pytest.mark.parametrize("scheduler", [flow(4), flow(), flow(13, shift=1.0), flux(), flux(13)])
@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_samples_as_the_original(codebase, original, scheduler, noise_level):
    with patch_flow_grpo():
        for t in scheduler.timesteps:
            output, sample = latents(2)
            seed = int(t)
            arguments = (scheduler, output, t.unsqueeze(0), sample, noise_level)
            torch.manual_seed(seed)
            expected = original[0](*arguments, return_sqrt_dt=True)
            stream = torch.get_rng_state()
            torch.manual_seed(seed)
            assert_same(codebase.sde_step_with_logprob(*arguments, return_sqrt_dt=True), expected)
            assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("scheduler", [flow(), flux(13)])
def test_the_solver_samples_as_the_original(codebase, original, scheduler):
    with patch_flow_grpo():
        for index in range(len(scheduler.timesteps)):
            output, sample = latents(2)
            arguments = (output, sample, 0.7, scheduler.sigmas, index, None)
            torch.manual_seed(index)
            expected = original[1](*arguments)
            torch.manual_seed(index)
            assert_same(sys.modules[SOLVER].flow_grpo_step(*arguments), expected)
            given = (*arguments[:-1], latents(1)[0])
            assert_same(sys.modules[SOLVER].flow_grpo_step(*given), original[1](*given))


@pytest.mark.parametrize("scheduler", [flow(), flux(28)])
def test_scores_and_differentiates_as_the_original(codebase, original, scheduler):
    output, sample, prev = latents(3)
    timestep = scheduler.timesteps[torch.tensor([9, 0, 4])]
    inputs = [output.double().requires_grad_(), output.clone().requires_grad_()]
    expected = original[0](scheduler, inputs[0], timestep, sample.double(), 0.7, prev.double())
    with patch_flow_grpo():
        found = codebase.sde_step_with_logprob(scheduler, inputs[1], timestep, sample, 0.7, prev)
    assert_same(found, expected)
    weights, target = torch.randn(SHAPE[0]), torch.randn(SHAPE)
    for _, logprob, mean, spread in (expected, found):
        # The log-probability and, for the KL, the mean: both are trained through.
        ((logprob * weights).sum() + ((mean - target) ** 2 / (2 * spread**2)).mean()).backward()
    torch.testing.assert_close(inputs[1].grad.double(), inputs[0].grad, rtol=1e-4, atol=1e-6)


def test_a_generator_beside_a_given_sample_is_not_used(codebase, original):
    scheduler, (output, sample, prev) = flow(), latents(3)
    arguments = (scheduler, output, scheduler.timesteps[:1], sample, 0.7, prev, torch.Generator())
    with patch_flow_grpo():
        assert_same(codebase.sde_step_with_logprob(*arguments), original[0](*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_raised_to_float32(codebase, original, dtype):
    scheduler = flow()
    output, sample, prev = latents(3, dtype)
    timestep = scheduler.timesteps[[9, 0, 4]]
    store = sample[:, None].expand(-1, 2, *SHAPE[1:])
    with patch_flow_grpo():
        found = codebase.sde_step_with_logprob(scheduler, output, timestep, store[:, 1], 0.7, prev)
    assert_same(found, original[0](scheduler, output, timestep, sample, 0.7, prev))


def test_an_unchanged_model_has_the_ratio_1(codebase):
    scheduler, (output, sample) = flow(), latents(2)
    t = scheduler.timesteps[3]
    for noise in ("torch", "philox"):
        with patch_flow_grpo(noise=noise):
            step = codebase.sde_step_with_logprob
            prev, logprob, _, _ = step(scheduler, output, t.unsqueeze(0), sample)
            _, again, _, _ = step(scheduler, output, t.expand(SHAPE[0]), sample, prev_sample=prev)
            assert torch.equal(logprob, again)
            # Flow-GRPO samples by its solver and trains by the other function.
            prev, _, logprob = sys.modules[SOLVER].flow_grpo_step(
                output, sample, 0.7, scheduler.sigmas, 3, None
            )
            _, again, _, _ = step(scheduler, output, t.expand(SHAPE[0]), sample, prev_sample=prev)
            assert torch.equal(logprob, again)


def test_philox_noise_is_normal_and_follows_the_seed(codebase):
    scheduler, sample = flow(), torch.zeros(4, 4, 64, 64)
    drawn = []
    with patch_flow_grpo(noise="philox"):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            prev, _, mean, spread, duration = codebase.sde_step_with_logprob(
                scheduler, sample, scheduler.timesteps[3:4], sample, return_sqrt_dt=True
            )
            drawn.append((prev - mean) / (spread * duration))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    z = drawn[0].double().flatten()
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * len(z)) ** 0.5


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_without_noise_the_sample_is_the_mean_and_has_no_logprob(codebase, original, noise):
    scheduler, (output, sample) = flow(), latents(2)
    arguments = (scheduler, output, scheduler.timesteps[3:4], sample, 0.0)
    expected, expected_logprob, *_ = original[0](*arguments)
    with patch_flow_grpo(noise=noise):
        found, logprob, *_ = codebase.sde_step_with_logprob(*arguments)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert expected_logprob.isnan().all()
    assert logprob.isnan().all()


def test_a_change_of_the_scheduler_is_noticed(codebase, original):
    scheduler, (output, sample, prev) = flow(10), latents(3)
    with patch_flow_grpo():
        for change in (
            lambda: None,
            lambda: scheduler.set_timesteps(20),
            lambda: scheduler.set_shift(5.0),
            lambda: scheduler.set_timesteps(20),
            lambda: scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5]),
        ):
            change()
            for noise_level in (0.7, 0.4):
                arguments = (scheduler, output, scheduler.timesteps[[1, 2, 0]], sample, noise_level, prev)
                assert_same(codebase.sde_step_with_logprob(*arguments), original[0](*arguments))


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_the_table_is_that_of_the_schedules(noise_level):
    scheduler = flow(17)
    table = make_schedule(scheduler.sigmas, noise_level, torch.device("cpu")).transitions.table
    assert torch.equal(table[:-1], transition_schedule(scheduler, 17, noise_level=noise_level).table)


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_nothing_is_read_back_to_the_host(codebase, noise):
    # On the device "meta" tensors have no values: whatever asks for one, or for a copy on the CPU, raises.
    scheduler, (output, sample, prev) = flow(), latents(3, device="meta")
    scheduler.set_timesteps(10, device="meta")
    with patch_flow_grpo(noise=noise):
        step = codebase.sde_step_with_logprob
        for timestep in (scheduler.timesteps[:1], scheduler.timesteps[: SHAPE[0]]):
            drawn, logprob, _, _ = step(scheduler, output, timestep, sample)
            assert (drawn.device.type, logprob.shape) == ("meta", SHAPE[:1])
            output.requires_grad_()
            step(scheduler, output, timestep, sample, prev_sample=prev)[1].sum().backward()
            output = output.detach()
        drawn, clean, _ = sys.modules[SOLVER].flow_grpo_step(output, sample, 0.7, scheduler.sigmas, 3, None)
        assert drawn.device.type == clean.device.type == "meta"


def test_sampling_that_is_differentiated_is_left_to_the_original(codebase, original):
    scheduler, (output, sample) = flow(), latents(2)

    def sde(step, model_output, x):
        return step(scheduler, model_output, scheduler.timesteps[3:4], x)

    def solver(step, model_output, x):
        return step(model_output, x, 0.7, scheduler.sigmas, 3, None)

    with patch_flow_grpo(noise="philox"):
        steps = (codebase.sde_step_with_logprob, sys.modules[SOLVER].flow_grpo_step)
        for call, expected, found in zip((sde, solver), original, steps, strict=True):
            gradients = []
            for step in (expected, found):
                inputs = output.clone().requires_grad_(), sample.clone().requires_grad_()
                torch.manual_seed(0)
                gradients.append(torch.autograd.grad(call(step, *inputs)[0].sum(), inputs))
            assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_errors_say_what_is_wrong(codebase, monkeypatch):
    scheduler, (output, sample) = flow(), latents(2)
    with patch_flow_grpo():
        step = codebase.sde_step_with_logprob
        with pytest.raises(ValueError, match=r"timestep 5\.0 is none of the 10 that the scheduler is set to"):
            step(scheduler, output, torch.tensor([5.0]), sample)
        with pytest.raises(ValueError, match="sde_type='cps' has no replacement"):
            step(scheduler, output, scheduler.timesteps[:1], sample, sde_type="cps")
        with pytest.raises(ValueError, match="generator and prev_sample exclude each other"):
            sys.modules[SOLVER].flow_grpo_step(
                output, sample, 0.7, scheduler.sigmas, 3, sample, torch.Generator()
            )
    with pytest.raises(ValueError, match="noise must be one of torch, philox, got 'white'"):
        patch_flow_grpo(noise="white")
    codebase.sde_step_with_logprob = lambda self, model_output: None
    with pytest.raises(LoopfastError, match=r"does not know this version .* it takes \(self, model_output\)"):
        patch_flow_grpo()
    monkeypatch.delitem(sys.modules, codebase.__name__)
    with pytest.raises(LoopfastError, match=r"patch_flow_grpo\(\) needs Flow-GRPO \(github"):
        patch_flow_grpo()
