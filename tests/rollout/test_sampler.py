from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.errors import LoopfastError
from loopfast.policies import Policy, expand, load_policy, load_schedule
from loopfast.policies.resolution import decoder_rows
from loopfast.rollout import Sampler, automatic_microbatch, initial_latents, slices
from loopfast.rollout.trajectories import Trajectories
from loopfast_kernels import philox_normal, transition_logprob

PROMPTS = ["a red circle and a blue square", "three green triangles", "an outlined cyan circle"]
STEPS = 5
ROWS = torch.tensor([0, 0, 1, 1, 2, 2, 0])
SEEDS = torch.tensor([5, 6, 7, 8, 9, 2**62 + 3, 11])


@pytest.fixture(scope="module")
def policy(pipeline_folder: Path) -> Policy:
    return load_policy(ModelConfig(pretrained=str(pipeline_folder), device="cpu"))


def sampler(policy: Policy, microbatch: int = 4, guidance: float = 1.0, reduction: str = "sum") -> Sampler:
    config: Any = policy
    schedule = load_schedule(config._config, RolloutConfig(steps=STEPS, eta=1.0))
    return Sampler(policy, schedule, guidance, reduction, microbatch)


def stream(made: Sampler, **options: Any) -> Trajectories:
    """Returns the result of microbatches, one after the other."""
    found = made.allocate(len(SEEDS))
    for _ in made.stream(found, made.policy.encode(PROMPTS), ROWS, SEEDS, **options):
        pass
    return found


def run(made: Sampler, rows: Tensor = ROWS, seeds: Tensor = SEEDS) -> Trajectories:
    return made.sample(made.policy.encode(PROMPTS), rows, seeds)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_microbatches_change_nothing(policy: Policy, guidance: float) -> None:
    whole = run(sampler(policy, 7, guidance))
    assert whole.latents.shape == (STEPS + 1, 7, *policy.latent_shape)
    assert whole.logprob.shape == (STEPS, 7)
    for microbatch in (1, 2, 3, 5, 16):
        parts = run(sampler(policy, microbatch, guidance))
        assert torch.equal(parts.latents[0], whole.latents[0])
        torch.testing.assert_close(parts.latents, whole.latents, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(parts.logprob, whole.logprob, atol=1e-3, rtol=1e-5)


def test_sampling_again_is_the_same_to_the_bit(policy: Policy) -> None:
    first, again = run(sampler(policy)), run(sampler(policy))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.logprob, again.logprob)


def test_a_row_is_decided_by_its_seed_and_prompt(policy: Policy) -> None:
    """A row is the same with any other rows and in any order."""
    whole = run(sampler(policy))
    order = torch.tensor([6, 2, 0, 5, 1])
    some = run(sampler(policy), ROWS[order], SEEDS[order])
    # libraries may round a row by its place in a call
    torch.testing.assert_close(some.latents, whole.latents[:, order], atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(some.logprob, whole.logprob[:, order], atol=1e-3, rtol=1e-5)

    same = run(sampler(policy), torch.tensor([1, 1]), torch.tensor([7, 7]))
    torch.testing.assert_close(same.latents[:, 0], same.latents[:, 1], atol=5e-5, rtol=1e-5)
    prompt = run(sampler(policy), torch.tensor([0, 1]), torch.tensor([7, 7]))
    assert torch.equal(prompt.latents[0, 0], prompt.latents[0, 1])
    assert (prompt.final[0] - prompt.final[1]).abs().max() > 1e-3


def test_initial_noise_is_normal_and_no_transitions(policy: Policy) -> None:
    seeds = torch.arange(200)
    noise = initial_latents(policy, seeds)
    assert noise.mean().abs() < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    for step in range(STEPS):
        transition = philox_normal(seeds, torch.full_like(seeds, step), tuple(noise.shape))
        correlation = torch.corrcoef(torch.stack([noise.flatten(), transition.flatten()]))[0, 1]
        assert correlation.abs() < 0.02


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_stored_latents(
    policy: Policy, reduction: str, guidance: float
) -> None:
    made = sampler(policy, 7, guidance, reduction)
    found = run(made)
    text = expand(policy.encode(PROMPTS), ROWS)
    for index in range(STEPS):
        step = torch.full((7,), index)
        output, unconditional = policy.predict(
            found.latents[index], made.schedule.timesteps[step], text, guidance
        )
        again = transition_logprob(
            output,
            found.latents[index],
            found.latents[index + 1],
            made.schedule.table,
            step,
            uncond_output=unconditional,
            guidance_scale=guidance,
            reduction=reduction,
        )
        assert torch.equal(again, found.logprob[index])


class PhiloxDDIM(DDIMScheduler):
    """Diffusers' own step, given the noise that the sampler draws."""

    seeds: Tensor

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0, **options: Any
    ) -> Any:
        index = self.timesteps.tolist().index(int(timestep))
        noise = philox_normal(self.seeds, torch.full_like(self.seeds, index), tuple(sample.shape))
        return super().step(model_output, timestep, sample, eta=eta, variance_noise=noise, **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_diffusers_pipeline_samples_the_same(policy: Policy, pipeline_folder: Path, guidance: float) -> None:
    ours = run(sampler(policy, 7, guidance))
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = PhiloxDDIM.from_config(policy.scheduler.config)
    pipeline.scheduler.seeds = SEEDS
    arguments = {
        "prompt": [PROMPTS[row] for row in ROWS],
        "latents": initial_latents(policy, SEEDS),
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "eta": 1.0,
    }
    theirs = pipeline(**arguments, output_type="latent").images
    torch.testing.assert_close(ours.final, theirs, atol=2e-5, rtol=1e-5)
    images = pipeline(**arguments, output_type="pt").images
    torch.testing.assert_close(sampler(policy, 2).decode(ours.final), images, atol=2e-5, rtol=0)


def test_what_is_between_microbatches_may_stop_it(policy: Policy) -> None:
    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    made = sampler(policy, 3)
    with pytest.raises(KeyboardInterrupt):
        stream(made, between=between)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_latents_are_stored_in_the_policys_type(pipeline_folder: Path, dtype: Any) -> None:
    half = load_policy(ModelConfig(pretrained=str(pipeline_folder), device="cpu", dtype=dtype))
    found = run(sampler(half))
    assert found.latents.dtype == half.dtype
    assert found.logprob.dtype == torch.float32
    assert found.latents.isfinite().all()
    assert sampler(half).decode(found.final).dtype == torch.float32


def test_slices_cover_a_range_once() -> None:
    for count in range(9):
        for size in range(1, 5):
            covered = [i for part in slices(count, size) for i in range(count)[part]]
            assert covered == list(range(count))
            assert all(part.stop - part.start <= size for part in slices(count, size))


def test_automatic_microbatches() -> None:
    assert automatic_microbatch(1000, (4, 64, 64)) == 4
    assert automatic_microbatch(1000, (4, 8, 8)) == 256
    assert automatic_microbatch(12, (4, 8, 8)) == 12
    assert automatic_microbatch(12, (4, 512, 512)) == 1


@contextmanager
def room_to_decode(policy: Any, rows: int, error: Exception) -> Iterator[list[int]]:
    """Context in which decoding more latents at a time raises an error; yields the number of latents of each call."""
    decode, calls = policy.decode, list[int]()

    def limited(latents: Tensor) -> Tensor:
        calls.append(len(latents))
        if len(latents) > rows:
            raise error
        return decode(latents)

    policy.decode = limited
    try:
        yield calls
    finally:
        del policy.decode


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_decoding_takes_fewer_images_where_memory_does_not_suffice_and_the_denoiser_as_many(
    policy: Policy, error: Exception
) -> None:
    made = sampler(policy, 6)
    latents = run(made).final
    expected = made.decode(latents)
    with room_to_decode(policy, 2, error) as calls:
        images = made.decode(latents)
        assert calls == [6, 3, 1, 1, 1, 1, 1, 1, 1]
        # a sampler with another microbatch keeps the limit
        replace(made, microbatch=5).decode(latents[:2])
    assert calls[9:] == [1, 1]
    assert made.microbatch == 6
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_where_not_even_one_image_can_be_decoded_the_error_is_not_the_denoisers(policy: Policy) -> None:
    made = sampler(policy, 4)
    latents = run(made).final
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with (
        room_to_decode(policy, 0, out_of_memory),
        pytest.raises(
            LoopfastError, match=r"not even one image can be decoded.*vae_tiling.*\(CUDA out of memory\)"
        ),
    ):
        made.decode(latents)


def test_other_errors_of_the_decoder_are_not_about_memory(policy: Policy) -> None:
    made = sampler(policy, 4)
    latents = run(made).final
    with room_to_decode(policy, 0, RuntimeError("a bug")), pytest.raises(RuntimeError, match="a bug"):
        made.decode(latents)


@pytest.mark.parametrize(
    ("channels", "size", "rows"),
    [((128, 256, 512, 512), (64, 64), 4), ((128, 256, 512, 512), (128, 128), 1), ((32, 64), (16, 16), 4096)],
)
def test_as_many_images_are_decoded_at_a_time_as_take_four_gigabytes(
    channels: tuple[int, ...], size: tuple[int, int], rows: int
) -> None:
    assert decoder_rows({"block_out_channels": channels}, size) == rows
