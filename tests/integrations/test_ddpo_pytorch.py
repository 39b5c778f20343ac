"""ddpo-pytorch is no package of a registry: its formula stands here in float64, under the names it has there."""

from __future__ import annotations

import sys
from itertools import product
from types import ModuleType

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.distributions import Normal

from loopfast.errors import LoopfastError
from loopfast.integrations import patch_ddpo_pytorch

SHAPE = (3, 4, 5, 6)
ROOM = "ddpo_pytorch.diffusers_patch"


def ddim_step_with_logprob(
    self,
    model_output,
    timestep,
    sample,
    eta=0.0,
    use_clipped_model_output=False,
    generator=None,
    prev_sample=None,
):
    """Equations 12 and 16 of the DDIM paper, by way of x_0 and epsilon; no step ends before timestep 0."""
    x, m = sample.double(), model_output.double()
    earlier = (timestep - self.config.num_train_timesteps // self.num_inference_steps).clamp(min=0)
    alphas = self.alphas_cumprod.double()
    now, then = (alphas[t].reshape(-1, *[1] * (x.dim() - 1)) for t in (timestep, earlier))
    if self.config.prediction_type == "epsilon":
        clean, noise = (x - (1 - now).sqrt() * m) / now.sqrt(), m
    elif self.config.prediction_type == "sample":
        clean, noise = m, (x - now.sqrt() * m) / (1 - now).sqrt()
    else:
        clean, noise = now.sqrt() * x - (1 - now).sqrt() * m, now.sqrt() * m + (1 - now).sqrt() * x
    sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    mean = then.sqrt() * clean + (1 - then - sigma**2).clamp(min=0).sqrt() * noise
    if prev_sample is None:
        drawn = randn_tensor(model_output.shape, generator=generator, dtype=model_output.dtype)
        prev_sample = mean + sigma * drawn
    logprob = Normal(mean, sigma, validate_args=False).log_prob(prev_sample.detach())
    return prev_sample.to(sample.dtype), logprob.flatten(1).mean(1)


@pytest.fixture
def codebase(monkeypatch) -> ModuleType:
    """The module that defines the function, beside one that has imported it and a script that has renamed it."""
    definer, pipeline, script = (
        ModuleType(name) for name in (f"{ROOM}.ddim_with_logprob", f"{ROOM}.pipeline_with_logprob", "train")
    )
    definer.ddim_step_with_logprob, definer.randn_tensor = ddim_step_with_logprob, randn_tensor
    pipeline.ddim_step_with_logprob = ddim_step_with_logprob
    script.step = ddim_step_with_logprob
    for module in (definer, pipeline, script):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return definer


@pytest.fixture
def original():
    """The formula, out of a patch's reach: not in a module."""
    return [ddim_step_with_logprob]


def ddim(steps: int | None = 10, **options) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "steps_offset": 1,
            **options,
        }
    )
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def latents(count: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    return torch.randn(count, *SHAPE).to(device, dtype).unbind()


def test_replaces_the_function_where_it_is_bound_and_restores_it(codebase, original):
    pipeline, script = sys.modules[f"{ROOM}.pipeline_with_logprob"], sys.modules["train"]
    with patch_ddpo_pytorch():
        patched = codebase.ddim_step_with_logprob
        assert patched is not original[0]
        assert pipeline.ddim_step_with_logprob is script.step is patched
        with patch_ddpo_pytorch(noise="philox"):
            assert codebase.ddim_step_with_logprob not in (patched, original[0])
        assert pipeline.ddim_step_with_logprob is script.step is patched
    assert codebase.ddim_step_with_logprob is original[0]
    assert pipeline.ddim_step_with_logprob is script.step is original[0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_samples_as_the_original(codebase, original, prediction, spacing):
    options = {"prediction_type": prediction, "timestep_spacing": spacing}
    with patch_ddpo_pytorch():
        for (steps, eta), to_one in product([(4, 1.0), (10, 0.7), (50, 1.0)], [False, True]):
            scheduler = ddim(steps, set_alpha_to_one=to_one, **options)
            for t in scheduler.timesteps[:: 7 if steps == 50 else 1]:
                output, sample = latents(2)
                torch.manual_seed(int(t))
                expected, expected_logprob = original[0](scheduler, output, t, sample, eta=eta)
                stream = torch.get_rng_state()
                torch.manual_seed(int(t))
                found, logprob = codebase.ddim_step_with_logprob(scheduler, output, t, sample, eta=eta)
                assert torch.equal(torch.get_rng_state(), stream)
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
                # The last sigma may be 0.02: rounding x_{t-1} to float32 then moves z by up to 1e-5. With linspace the
                # last step goes from timestep 0 to itself: NaN.
                torch.testing.assert_close(
                    logprob.double(), expected_logprob, rtol=0, atol=1e-5, equal_nan=spacing == "linspace"
                )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_scores_and_differentiates_as_the_original(codebase, original, prediction):
    scheduler = ddim(prediction_type=prediction)
    output, sample, prev = latents(3)
    timestep = scheduler.timesteps[torch.tensor([9, 0, 4])]
    inputs = [output.double().requires_grad_(), output.clone().requires_grad_()]
    _, expected_logprob = original[0](
        scheduler, inputs[0], timestep, sample.double(), eta=1.0, prev_sample=prev.double()
    )
    with patch_ddpo_pytorch():
        found, logprob = codebase.ddim_step_with_logprob(
            scheduler, inputs[1], timestep, sample, eta=1.0, prev_sample=prev
        )
    assert torch.equal(found, prev)
    # A sample of another transition: log-probabilities down to -1e3.
    torch.testing.assert_close(logprob.double(), expected_logprob, rtol=1e-5, atol=1e-5)
    weights = torch.randn(SHAPE[0])
    for result in (expected_logprob, logprob):
        (result * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad.double(), inputs[0].grad, rtol=1e-4, atol=1e-7)


def test_takes_what_a_trainer_hands_it(codebase, original):
    """Slices of ``[N, T, ...]`` stores, which are not contiguous."""
    scheduler = ddim()
    store, nexts = torch.randn(2, SHAPE[0], 10, *SHAPE[1:])
    output = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    timestep = scheduler.timesteps.repeat(SHAPE[0], 1)[:, 3]
    with patch_ddpo_pytorch():
        _, logprob = codebase.ddim_step_with_logprob(
            scheduler, output, timestep, store[:, 3], eta=1.0, prev_sample=nexts[:, 3]
        )
    _, expected = original[0](scheduler, output, timestep, store[:, 3], eta=1.0, prev_sample=nexts[:, 3])
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_generators_are_used_as_by_the_original(codebase, original, several):
    def generator():
        made = [torch.Generator().manual_seed(seed) for seed in range(SHAPE[0])]
        return made if several else made[0]

    scheduler, (output, sample) = ddim(), latents(2)
    t = scheduler.timesteps[3]
    expected, _ = original[0](scheduler, output, t, sample, 1.0, generator=generator())
    with patch_ddpo_pytorch():
        found, _ = codebase.ddim_step_with_logprob(scheduler, output, t, sample, 1.0, generator=generator())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_an_unchanged_model_has_the_ratio_1(codebase, dtype, noise):
    scheduler, (output, sample) = ddim(), latents(2, dtype)
    t = scheduler.timesteps[3]
    with patch_ddpo_pytorch(noise=noise):
        prev, logprob = codebase.ddim_step_with_logprob(scheduler, output, t, sample, eta=1.0)
        assert prev.dtype == dtype
        _, again = codebase.ddim_step_with_logprob(
            scheduler, output, t.expand(SHAPE[0]), sample, eta=1.0, prev_sample=prev
        )
    assert torch.equal(logprob, again)


def test_philox_noise_is_normal_and_follows_the_generators(codebase, original):
    scheduler = ddim()
    zeros = torch.zeros(4, 4, 64, 64)
    t = scheduler.timesteps[3]

    def draw(generator=None) -> torch.Tensor:
        return codebase.ddim_step_with_logprob(scheduler, zeros, t, zeros, 1.0, generator=generator)[0]

    with patch_ddpo_pytorch(noise="philox"):
        torch.manual_seed(1)
        first, second = draw(), draw()
        torch.manual_seed(1)
        assert torch.equal(first, draw())
        assert not torch.equal(first, second)
        rows = draw([torch.Generator().manual_seed(seed) for seed in (7, 7, 8, 9)])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    # The density at the mean is 1 / (sigma sqrt(2 pi)).
    _, peak = original[0](scheduler, zeros, t, zeros, eta=1.0, prev_sample=zeros)
    z = first.double().flatten() * peak[0].exp() * (2 * torch.pi) ** 0.5
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * len(z)) ** 0.5


def test_deterministic_steps_have_no_logprob_as_in_the_original(codebase, original):
    scheduler, (output, sample) = ddim(steps_offset=0), latents(2)
    first, last = scheduler.timesteps[[0, -1]]
    assert last == 0, "with this offset the last step goes from timestep 0 to timestep 0"
    with patch_ddpo_pytorch():
        for t, eta, undefined in ((first, 0.0, True), (last, 1.0, True), (first, 1.0, False)):
            torch.manual_seed(0)
            expected, expected_logprob = original[0](scheduler, output, t, sample, eta=eta)
            torch.manual_seed(0)
            found, logprob = codebase.ddim_step_with_logprob(scheduler, output, t, sample, eta=eta)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
            assert bool(expected_logprob.isnan().all()) == bool(logprob.isnan().all()) == undefined


def test_a_change_of_the_scheduler_is_noticed(codebase, original):
    scheduler, (output, sample, prev) = ddim(10), latents(3)

    def check() -> None:
        t = scheduler.timesteps[[1, 2, 0]]
        _, expected = original[0](scheduler, output, t, sample, eta=0.9, prev_sample=prev)
        _, found = codebase.ddim_step_with_logprob(scheduler, output, t, sample, eta=0.9, prev_sample=prev)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    with patch_ddpo_pytorch():
        check()
        scheduler.set_timesteps(20)
        check()
        scheduler.register_to_config(prediction_type="v_prediction")
        check()
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.1
        check()
        scheduler.set_timesteps(10)
        check()


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_nothing_is_read_back_to_the_host(codebase, noise):
    # On the device "meta" tensors have no values: whatever asks for one, or for a copy on the CPU, raises.
    scheduler, (output, sample, prev) = ddim(), latents(3, device="meta")
    t = scheduler.timesteps.to("meta")
    with patch_ddpo_pytorch(noise=noise):
        step = codebase.ddim_step_with_logprob
        for timestep in (t[0], t[:1], t[: SHAPE[0]]):
            drawn, logprob = step(scheduler, output, timestep, sample, eta=1.0)
            assert (drawn.device.type, logprob.shape) == ("meta", SHAPE[:1])
            output.requires_grad_()
            step(scheduler, output, timestep, sample, eta=1.0, prev_sample=prev)[1].sum().backward()
            output = output.detach()


@pytest.mark.parametrize(
    ("which", "given"), [((0, 1), False), ((0,), False), ((1,), False), ((1,), True), ((0, 1), True)]
)
def test_samples_that_are_differentiated_are_left_to_the_original(codebase, original, which, given):
    scheduler, (output, sample, prev) = ddim(), latents(3)
    results = []
    with patch_ddpo_pytorch(noise="philox"):
        for step in (original[0], codebase.ddim_step_with_logprob):
            inputs = [output.clone(), sample.clone()]
            wanted = [inputs[index].requires_grad_() for index in which]
            torch.manual_seed(0)
            drawn, logprob = step(
                scheduler,
                inputs[0],
                scheduler.timesteps[3],
                inputs[1],
                1.0,
                prev_sample=prev if given else None,
            )
            results.append(torch.autograd.grad(drawn.sum() + logprob.sum(), wanted))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (ddim(clip_sample=True), {}, "clip_sample=True makes the mean nonlinear"),
        (ddim(thresholding=True), {}, "thresholding=True makes the mean nonlinear"),
        (
            ddim(),
            {"use_clipped_model_output": True},
            "use_clipped_model_output=True makes the mean nonlinear",
        ),
        (ddim(), {"eta": 1.5}, "eta must lie between 0 and 1"),
        (ddim(), {"prev_sample": torch.zeros(SHAPE), "generator": torch.Generator()}, "exclude each other"),
        (ddim(), {"timestep": torch.tensor(5)}, "timestep 5 is none of the 10 that the scheduler is set to"),
        (ddim(None), {}, "call its set_timesteps first"),
        (EulerDiscreteScheduler(), {}, "EulerDiscreteScheduler has no Gaussian first-order transition"),
    ],
)
def test_what_has_no_transition_is_refused(codebase, scheduler, options, message):
    output, sample = latents(2)
    arguments = {"timestep": torch.tensor(901), "eta": 1.0} | options
    if isinstance(scheduler, EulerDiscreteScheduler):
        scheduler.set_timesteps(10)
    with patch_ddpo_pytorch(), pytest.raises(ValueError, match=message):
        codebase.ddim_step_with_logprob(scheduler, output, sample=sample, **arguments)


def test_a_fork_is_patched_by_its_module(monkeypatch, codebase, original):
    fork = ModuleType("fork.ddim")
    fork.ddim_step_with_logprob, fork.randn_tensor = original[0], randn_tensor
    monkeypatch.setitem(sys.modules, "fork.ddim", fork)
    with patch_ddpo_pytorch(module="fork.ddim"):
        assert fork.ddim_step_with_logprob is not original[0]


def test_errors_say_what_is_wrong(codebase, monkeypatch):
    with pytest.raises(ValueError, match="noise must be one of torch, philox, got 'white'"):
        patch_ddpo_pytorch(noise="white")
    codebase.ddim_step_with_logprob = lambda self, model_output: None
    with pytest.raises(LoopfastError, match=r"does not know this version .* it takes \(self, model_output\)"):
        patch_ddpo_pytorch()
    monkeypatch.delitem(sys.modules, codebase.__name__)
    with pytest.raises(LoopfastError, match=r"patch_ddpo_pytorch\(\) needs ddpo-pytorch \(github"):
        patch_ddpo_pytorch()
