"""Every family's policy against the pipeline it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.errors import ConfigError
from loopfast.policies import Policy, load_family, load_policy, load_schedule
from loopfast.rollout import Sampler, initial_latents
from tests.families import (
    FAMILIES,
    flux,
    pixart,
    settings_of,
    stable_diffusion_3,
    stable_diffusion_xl,
)

PROMPTS = ["a red circle and a blue square", "three green triangles"]
SEEDS = torch.arange(2)
STEPS = 2
TOKENS = 12
# Those whose pipelines differ in what is saved and encoded: v_prediction changes the schedule alone, 3.5 the blocks.
SAVED = ["sd", "sdxl", "sd3", "flux", "pixart"]


def settings(folder: Path, tune: str = "lora", **options: Any) -> ModelConfig:
    lora = {"rank": 2, "alpha": 4, **options.pop("lora", {})}
    return ModelConfig(pretrained=str(folder), device="cpu", tune=tune, lora=lora, **options)


@torch.no_grad()
def disturb(policy: Policy) -> None:
    """Stands for training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable().values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in policy.trainable().items()}


def draw(policy: Policy, config: ModelConfig, guidance: float) -> Tensor:
    """Images of the deterministic sampler."""
    quiet = RolloutConfig(steps=STEPS)
    name = "noise_level" if load_family(config).process == "flow" else "eta"
    schedule = load_schedule(config, quiet.model_copy(update={name: 0.0}))
    sampler = Sampler(policy, schedule, guidance, "mean", 2)
    return sampler.decode(sampler.sample(policy.encode(PROMPTS), SEEDS, SEEDS).final)


def theirs(pipeline: Any, policy: Policy, guidance: float, **options: Any) -> Tensor:
    """Images of diffusers' own pipeline from the same initial noise."""
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline).__name__.startswith("PixArt"):
        options = {
            "use_resolution_binning": False,
            "clean_caption": False,
            "height": 32,
            "width": 32,
            **options,
        }
    if type(pipeline.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        pipeline.scheduler = policy.scheduler
    images: Tensor = pipeline(
        PROMPTS,
        latents=initial_latents(policy, SEEDS),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="pt",
        **options,
    ).images
    return images


@pytest.mark.parametrize("family", ["sd-v", "sd35"])
def test_a_policy_draws_what_its_pipeline_draws(family: str, family_folder: Any) -> None:
    config = settings(family_folder(family), **settings_of(family))
    policy = load_policy(config)
    pipeline = DiffusionPipeline.from_pretrained(family_folder(family))
    for guidance in (1.0, 3.0):
        expected = theirs(pipeline, policy, guidance, **settings_of(family))
        torch.testing.assert_close(draw(policy, config, guidance), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", SAVED)
def test_an_adapter_before_and_after_training(family: str, family_folder: Any, tmp_path: Path) -> None:
    """Diffusers' pipeline draws the same without the adapter and with the one that is exported.

    The policy draws as before it was trained while it is its own reference, and its merged export draws what it draws.
    """
    place, options = family_folder(family), settings_of(family)
    config = settings(place, **options)
    policy = load_policy(config, keep_reference=True)
    pipeline = DiffusionPipeline.from_pretrained(place)
    for guidance in (1.0, 2.0):
        before = theirs(pipeline, policy, guidance, **options)
        torch.testing.assert_close(draw(policy, config, guidance), before, atol=2e-5, rtol=0)

    disturb(policy)
    trained = draw(policy, config, 2.0)
    assert (trained - before).abs().max() > 1e-3
    policy.export(tmp_path / "lora", weights(policy))
    policy.export_merged(tmp_path / "whole", weights(policy))
    assert torch.equal(draw(policy, config, 2.0), trained)
    with policy.reference():
        torch.testing.assert_close(draw(policy, config, 2.0), before, atol=2e-5, rtol=0)

    if family == "pixart":
        from peft import PeftModel

        pipeline.transformer = PeftModel.from_pretrained(
            pipeline.transformer, tmp_path / "lora"
        ).base_model.model
    else:
        pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(theirs(pipeline, policy, 2.0, **options), trained, atol=5e-5, rtol=0)
    merged = settings(tmp_path / "whole", "full", **options)
    torch.testing.assert_close(draw(load_policy(merged), merged, 2.0), trained, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", SAVED)
def test_all_weights_before_and_after_training(family: str, family_folder: Any, tmp_path: Path) -> None:
    """The reference is a copy; prompts encoded beforehand, without a text encoder, draw and export the same."""
    config = settings(family_folder(family), "full", **settings_of(family))
    policy = load_policy(config, keep_reference=True)
    before = draw(policy, config, 2.0)
    policy.free_text_encoder(PROMPTS)
    torch.testing.assert_close(draw(policy, config, 2.0), before, atol=1e-5, rtol=0)

    disturb(policy)
    trained = draw(policy, config, 2.0)
    assert (trained - before).abs().max() > 1e-3
    with policy.reference():
        torch.testing.assert_close(draw(policy, config, 2.0), before, atol=1e-5, rtol=0)
    policy.export(tmp_path, weights(policy))
    found = theirs(DiffusionPipeline.from_pretrained(tmp_path), policy, 2.0, **settings_of(family))
    torch.testing.assert_close(found, trained, atol=5e-5, rtol=0)
    again = settings(tmp_path, "full", **settings_of(family))
    torch.testing.assert_close(draw(load_policy(again), again, 2.0), trained, atol=1e-5, rtol=0)


def test_sdxl_without_zeros_for_the_empty_prompt(family_folder: Any) -> None:
    place = family_folder(_encoded_empty_prompt)
    config = settings(place)
    policy = load_policy(config)
    found = theirs(DiffusionPipeline.from_pretrained(place), policy, 3.0)
    torch.testing.assert_close(draw(policy, config, 3.0), found, atol=2e-5, rtol=0)


def _encoded_empty_prompt() -> Any:
    return stable_diffusion_xl(force_zeros_for_empty_prompt=False)


def _without_t5() -> Any:
    return stable_diffusion_3(t5=False)


def _schnell() -> Any:
    return flux(guidance_embeds=False)


def _alpha() -> Any:
    return pixart(alpha=True)


def test_pixart_alpha_is_told_its_size(family_folder: Any) -> None:
    place = family_folder(_alpha)
    size = {"height": 32, "width": 24}
    config = settings(place, **size)
    policy = load_policy(config)
    found = theirs(DiffusionPipeline.from_pretrained(place), policy, 3.0, **size)
    torch.testing.assert_close(draw(policy, config, 3.0), found, atol=2e-5, rtol=0)


def test_sd3_without_t5(family_folder: Any) -> None:
    place = family_folder(_without_t5)
    config = settings(place, max_sequence_length=TOKENS)
    policy = load_policy(config)
    pipeline = DiffusionPipeline.from_pretrained(place, text_encoder_3=None, tokenizer_3=None)
    found = theirs(pipeline, policy, 3.0, max_sequence_length=TOKENS)
    torch.testing.assert_close(draw(policy, config, 3.0), found, atol=2e-5, rtol=0)


def test_flux_without_distilled_guidance_is_guided_like_others(family_folder: Any) -> None:
    place = family_folder(_schnell)
    config = settings(place, **settings_of("flux"))
    policy = load_policy(config)
    found = theirs(
        DiffusionPipeline.from_pretrained(place),
        policy,
        0.0,
        negative_prompt=[""] * 2,
        true_cfg_scale=3.0,
        **settings_of("flux"),
    )
    torch.testing.assert_close(draw(policy, config, 3.0), found, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", SAVED)
def test_images_of_another_size(family: str, family_folder: Any) -> None:
    config = settings(family_folder(family), **{**settings_of(family), "height": 24, "width": 16})
    policy = load_policy(config)
    ours = draw(policy, config, 2.0)
    assert ours.shape == (2, 3, 24, 16)
    options = {**settings_of(family), "height": 24, "width": 16}
    pipeline = DiffusionPipeline.from_pretrained(family_folder(family))
    torch.testing.assert_close(ours, theirs(pipeline, policy, 2.0, **options), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd", {"height": 30}, r"model\.height: found 30, allowed: a multiple of 4"),
        ("flux", {"width": 28}, r"model\.width: found 28, allowed: a multiple of 8"),
        ("sd3", {"height": 128}, r"model\.height: found 128, allowed: at most 64"),
        ("sdxl", {"max_sequence_length": 9}, r"model\.max_sequence_length: found 9, allowed: null with SDXL"),
        (
            "sdxl",
            {"lora": {"text_encoder": True}},
            r"model\.lora\.text_encoder: found true, allowed: false with",
        ),
        (
            "flux",
            {"attention": "matmul"},
            r"model\.attention: found 'matmul', allowed: auto or sdpa with a Flux",
        ),
        ("sd35", {"lora": {"targets": ["nothing"]}}, r"model\.lora\.targets: \['nothing'\]"),
    ],
)
def test_what_a_family_does_not_have(
    family: str, options: dict[str, Any], message: str, family_folder: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(settings(family_folder(family), **{**settings_of(family), **options}))


def test_a_family_that_is_not_supported(family_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(
        ConfigError, match=r"is a KandinskyPipeline; supported: .*StableDiffusionXL.*Flux.*PixArt"
    ):
        load_policy(settings(tmp_path))


@pytest.mark.parametrize(("family", "key"), [("sd", "noise_level"), ("sd3", "eta")])
def test_noise_belongs_to_a_process(family: str, key: str, family_folder: Any) -> None:
    rollout = RolloutConfig.model_validate({"steps": 4, key: 0.5})
    with pytest.raises(ConfigError, match=rf"rollout\.{key} belongs to"):
        load_schedule(settings(family_folder(family)), rollout)


def test_variants_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    FAMILIES["sdxl"]().to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ConfigError, match=r"model\.variant: found null, allowed: fp16"):
        load_policy(settings(tmp_path))
    policy = load_policy(settings(tmp_path, variant="fp16"))
    assert next(policy.denoiser.parameters()).dtype == torch.float32


def test_pickled_weights_are_read_where_that_is_allowed(tmp_path: Path) -> None:
    pipeline = FAMILIES["sd"]()
    pipeline.save_pretrained(tmp_path)
    for file in sorted(tmp_path.glob("*/*.safetensors")):
        name = "pytorch_model.bin" if file.name.startswith("model.") else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(
        ConfigError, match=r"unet' are pickled only .*\.bin\), .*model\.allow_pickle: true reads"
    ):
        load_policy(settings(tmp_path))
    policy = load_policy(settings(tmp_path, "full", allow_pickle=True))
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(policy.trainable()[name], value)


def test_a_program_in_a_pickled_file_does_not_run(tmp_path: Path, family_folder: Any) -> None:
    place = Path(shutil.copytree(family_folder("sd"), tmp_path / "model"))
    (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    trap = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})"

    class Program:
        def __reduce__(self) -> Any:
            return exec, (trap,)

    torch.save({"conv_in.weight": Program()}, place / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.pretrained: cannot load"):
        load_policy(settings(place, allow_pickle=True))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("guidance", "shared"), [(1.0, True), (3.0, True), (3.0, False)])
def test_a_trained_text_encoder(guidance: float, shared: bool, family_folder: Any) -> None:
    config = settings(family_folder("sd"), lora={"text_encoder": True}, shared_trunk=shared)
    policy = load_policy(config, seed=3)
    plain = draw(load_policy(settings(family_folder("sd"))), config, guidance)
    torch.testing.assert_close(draw(policy, config, guidance), plain, atol=1e-5, rtol=0)
    names = policy.trainable()
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    policy.predict(
        torch.randn(2, *policy.latent_shape), torch.tensor([5, 9]), policy.encode(PROMPTS), guidance
    )[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in names.items() if "text_enc" in n)
    disturb(policy)
    assert (draw(policy, config, guidance) - plain).abs().max() > 1e-3
    with policy.reference():
        torch.testing.assert_close(draw(policy, config, guidance), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [{"text_encoder": True}, {"dora": True, "init": "gaussian"}])
def test_an_export_of_another_adapter(lora: dict[str, Any], family_folder: Any, tmp_path: Path) -> None:
    config = settings(family_folder("sd"), lora=lora)
    policy = load_policy(config)
    assert ("DoRA rank 2" in policy.describe()) == ("dora" in lora)
    disturb(policy)
    trained = draw(policy, config, 2.0)
    policy.export(tmp_path / "lora", weights(policy))
    policy.export_merged(tmp_path / "whole", weights(policy))
    assert torch.equal(draw(policy, config, 2.0), trained)
    pipeline = DiffusionPipeline.from_pretrained(family_folder("sd"))
    pipeline.load_lora_weights(tmp_path / "lora")
    for found in (pipeline, DiffusionPipeline.from_pretrained(tmp_path / "whole")):
        torch.testing.assert_close(theirs(found, policy, 2.0), trained, atol=5e-5, rtol=0)


def test_initial_values_of_an_adapter(family_folder: Any) -> None:
    first = {
        init: next(
            p for n, p in load_policy(settings(family_folder("sd"), lora={"init": init})).trainable().items()
        )
        for init in ("kaiming", "gaussian")
    }
    assert not torch.equal(first["kaiming"], first["gaussian"])
