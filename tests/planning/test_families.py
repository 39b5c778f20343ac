"""The plan of every family against its policy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.planning.check_memory import tensors_held
from loopfast.config import Config, parse_config
from loopfast.errors import ConfigError
from loopfast.planning import as_dict, load_architecture, plan
from loopfast.planning.memory import footprint
from loopfast.planning.networks import form_of, sampling_call, training_call, weights_of
from loopfast.policies import Policy, load_policy
from loopfast.policies.families import family_of
from tests.families import FAMILIES as TINY
from tests.families import save_tiny, settings_of

ROWS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def saved(family: str) -> Path:
        return save_tiny(family, tmp_path_factory.mktemp(family) / "model")

    return saved


def config(folder: Path, family: str, *overrides: str) -> Config:
    # without the accelerations of a CPU
    text = f"model: {{pretrained: '{folder}', device: cpu, attention: sdpa, lora: {{rank: 2, alpha: 2}}}}"
    tiny = [f"model.{key}={value}" for key, value in settings_of(family).items()]
    return parse_config(text, [*tiny, *overrides])


@pytest.mark.parametrize("family", TINY)
def test_a_policy_has_the_shapes_and_weights_that_are_planned(folder: Any, family: str) -> None:
    there = config(folder(family), family, "model.tune=lora")
    architecture = load_architecture(there.model)
    policy = load_policy(there.model)
    assert architecture.trainable
    assert architecture.latent_shape == policy.latent_shape
    encoded = policy.encode(["a red circle"])["encoder_hidden_states"]
    assert (architecture.text_tokens, architecture.text_width) == encoded.shape[1:]
    images = policy.decode(torch.zeros(1, *policy.latent_shape))
    assert architecture.image_shape == images.shape[1:]
    weights = weights_of(architecture, form_of(there, "cpu", sharded=False))
    assert weights.trained == sum(p.numel() for p in policy.trainable().values())
    assert weights.parameters == sum(p.numel() for p in policy.denoiser.parameters()) - weights.trained


def called(policy: Policy, guidance: float) -> int:
    """Returns the most bytes that a forward and backward pass allocates at a time."""
    with torch.no_grad():
        conditioning = policy.encode(["a red circle"] * ROWS)
        policy.predict(torch.zeros(ROWS, *policy.latent_shape), torch.ones(ROWS), conditioning, guidance)
    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        sample = torch.zeros(ROWS, *policy.latent_shape)
        previous = torch.zeros_like(sample)
        outputs = [
            output
            for output in policy.predict(sample, torch.ones(ROWS), conditioning, guidance)
            if output is not None
        ]
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        del previous
    return tensors_held(found.profiler.kineto_results.experimental_event_tree())


@pytest.mark.parametrize("family", ["sdxl", "sd3", "sd35", "flux", "pixart"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_call_holds_the_tensors_that_are_planned(folder: Any, family: str, tune: str) -> None:
    guidance = 3.0
    there = config(folder(family), family, f"model.tune={tune}", f"rollout.guidance_scale={guidance}")
    form = form_of(there, "cpu", sharded=False)
    planned = training_call(load_architecture(there.model), form, accumulating=True).peak(ROWS)
    assert planned == pytest.approx(called(load_policy(there.model), guidance), rel=0.1)


@pytest.mark.parametrize("family", TINY)
def test_a_denoiser_is_called_as_its_pipelines_policy_calls_it(folder: Any, family: str) -> None:
    architecture = load_architecture(config(folder(family), family).model)
    assert architecture.family == family_of(architecture.pipeline)


def test_a_size_in_pixels_is_planned() -> None:
    there = parse_config("model: {pretrained: embedded}", ["model.height=512", "model.width=768"])
    shapes = {
        name: (found.latent_shape, found.decoded_shape, found.image_shape)
        for name in ("sdxl", "sd35-medium", "flux-dev")
        for found in [load_architecture(there.model, name)]
    }
    assert shapes == {
        "sdxl": ((4, 64, 96), (4, 64, 96), (3, 512, 768)),
        "sd35-medium": ((16, 64, 96), (16, 64, 96), (3, 512, 768)),
        "flux-dev": ((32 * 48, 64), (16, 64, 96), (3, 512, 768)),
    }
    with pytest.raises(ConfigError, match=r"model\.height: found 520, allowed: a multiple of 16"):
        load_architecture(parse_config("model: {pretrained: embedded, height: 520}").model, "flux-dev")


def test_a_distilled_model_is_called_once_under_guidance() -> None:
    text = "model: {pretrained: embedded, height: 64, width: 64}"

    def flops(name: str, scale: float) -> int:
        there = parse_config(text, [f"rollout.guidance_scale={scale}"])
        found = load_architecture(there.model, name)
        small = {**found.denoiser.config, "num_layers": 1, "num_single_layers": 1}
        found = replace(found, denoiser=replace(found.denoiser, config=small))
        return sampling_call(found, form_of(there, "cuda", sharded=False)).flops

    assert flops("flux-dev", 1.0) == flops("flux-dev", 3.5)
    assert flops("flux-schnell", 3.5) == 2 * flops("flux-schnell", 1.0)


def test_what_is_not_counted_of_such_runs_is_said() -> None:
    text = (
        "{model: {pretrained: PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, height: 64, width: 64, tune: lora, "
        "free_text_encoder: true}, reward: [{name: pickscore}]}"
    )
    found = plan(parse_config(text), card="a100-80")
    said = "; ".join(as_dict(found)["not_counted"])
    assert "the model of a reward (pickscore)" in said
    # 300 rows of 4096 numbers of 4 bytes
    assert "the encoded prompts, 4.69 MiB each" in said
    averaged = parse_config(text, ["train.ema_decay=0.99"])
    held = footprint(averaged, found.architecture, found.resources).held
    assert held["average of the weights"] == 4 * found.weights.trained
