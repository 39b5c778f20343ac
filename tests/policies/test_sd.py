from __future__ import annotations

import json
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies import Policy, load_policy
from loopfast.policies.fast.switches import with_one_graph
from loopfast.rollout import Sampler, initial_latents
from loopfast.rollout.rollout_copy import RolloutCopy
from loopfast.schedules import transition_schedule

PROMPTS = ["a red circle and a blue square", "three green triangles", "an outlined cyan circle"]
TUNES = ["full", "lora"]


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in policy.trainable().items()}


def make(folder: Path, tune: str, *, seed: int = 0, keep_reference: bool = True, **options: Any) -> Policy:
    config = ModelConfig(
        pretrained=str(folder), device="cpu", tune=tune, lora={"rank": 4, "alpha": 8}, **options
    )
    return load_policy(config, seed=seed, keep_reference=keep_reference)


def inputs(policy: Policy) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    sample = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return sample.to(policy.dtype), torch.tensor([901, 401, 1]), policy.encode(PROMPTS)


@torch.no_grad()
def disturb(policy: Policy) -> None:
    """Stands for training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable().values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def outputs(policy: Policy) -> Tensor:
    return policy.predict(*inputs(policy))[0]


@pytest.mark.parametrize("tune", TUNES)
@torch.no_grad()
def test_guidance_is_one_call_that_equals_two(pipeline_folder: Path, tune: str) -> None:
    policy: Any = make(pipeline_folder, tune)
    disturb(policy)
    sample, timestep, text = inputs(policy)
    empty = policy.encode([""] * 3)
    calls = []
    policy.pipeline.unet.conv_out.register_forward_hook(lambda *_: calls.append(1))
    conditional, unconditional = policy.predict(sample, timestep, text, 3.0)
    assert len(calls) == 1
    torch.testing.assert_close(conditional, policy.predict(sample, timestep, text)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(unconditional, policy.predict(sample, timestep, empty)[0], atol=1e-5, rtol=0)
    assert (conditional - unconditional).abs().max() > 1e-4


@torch.no_grad()
def test_rows_have_their_own_timesteps_and_prompts(pipeline_folder: Path) -> None:
    policy = make(pipeline_folder, "full")
    sample, timestep, text = inputs(policy)
    together, nothing = policy.predict(sample, timestep, text)
    assert nothing is None
    for row in range(3):
        alone = policy.predict(
            sample[row : row + 1],
            timestep[row : row + 1],
            {name: value[row : row + 1] for name, value in text.items()},
        )[0]
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_an_adapter_starts_as_the_base(pipeline_folder: Path) -> None:
    full, lora = make(pipeline_folder, "full"), make(pipeline_folder, "lora")
    torch.testing.assert_close(outputs(lora), outputs(full), atol=1e-5, rtol=0)


def test_the_seed_decides_the_adapter(pipeline_folder: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (make(pipeline_folder, "lora", seed=seed).trainable() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_is_trained(pipeline_folder: Path) -> None:
    full: Any = make(pipeline_folder, "full")
    lora: Any = make(pipeline_folder, "lora")
    assert full.trainable().keys() == dict(full.pipeline.unet.named_parameters()).keys()
    assert lora.trainable()
    assert all("lora_" in name for name in lora.trainable())
    for policy in (full, lora):
        for frozen in (policy.pipeline.vae, policy.pipeline.text_encoder):
            assert not any(parameter.requires_grad for parameter in frozen.parameters())
        policy.predict(*inputs(policy))[0].square().mean().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.trainable().values())
    assert "UNet" in full.describe()
    assert "LoRA rank 4" in lora.describe()
    assert str(pipeline_folder) in lora.describe()


def test_lora_targets_choose_the_modules(pipeline_folder: Path) -> None:
    config = ModelConfig(
        pretrained=str(pipeline_folder), device="cpu", tune="lora", lora={"targets": ["to_q"]}
    )
    names = load_policy(config).trainable()
    assert names
    assert all(".to_q." in name for name in names)


@pytest.mark.parametrize("tune", TUNES)
def test_the_reference_is_the_model_before_training(pipeline_folder: Path, tune: str) -> None:
    policy = make(pipeline_folder, tune)
    before = outputs(policy)
    disturb(policy)
    trained = outputs(policy)
    assert (trained - before).abs().max() > 1e-3
    with policy.reference():
        torch.testing.assert_close(outputs(policy), before, atol=1e-5, rtol=0)
    assert torch.equal(outputs(policy), trained)


@pytest.mark.parametrize("tune", TUNES)
def test_the_policy_is_back_after_an_error(pipeline_folder: Path, tune: str) -> None:
    policy = make(pipeline_folder, tune)
    disturb(policy)
    trained = outputs(policy)
    trainable = list(policy.trainable())

    def fail() -> None:
        with policy.reference():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(outputs(policy), trained)
    assert list(policy.trainable()) == trainable


def test_a_reference_that_was_not_kept(pipeline_folder: Path) -> None:
    policy = make(pipeline_folder, "full", keep_reference=False)
    with pytest.raises(RuntimeError, match="keep_reference=False"), policy.reference():
        pass


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(pipeline_folder: Path, tune: str, dtype: str) -> None:
    exact = outputs(make(pipeline_folder, tune))
    policy = make(pipeline_folder, tune, dtype=dtype)
    assert policy.dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in policy.trainable().values()} == {torch.float32}
    found = outputs(policy)
    assert found.dtype == policy.dtype
    close = {"atol": 0.06 if dtype == "bfloat16" else 0.01, "rtol": 0}
    torch.testing.assert_close(found.float(), exact, **close)
    with policy.reference():
        torch.testing.assert_close(outputs(policy).float(), exact, **close)
    conditional, unconditional = policy.predict(*inputs(policy), 3.0)
    assert unconditional is not None
    assert conditional.dtype == unconditional.dtype == policy.dtype
    conditional.float().square().mean().backward()
    grads = [p.grad for p in policy.trainable().values() if p.grad is not None]
    assert grads
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    images = policy.decode(inputs(policy)[0])
    assert images.dtype == torch.float32
    assert images.shape == (3, 3, 32, 32)


def test_images_are_in_range(pipeline_folder: Path) -> None:
    policy = make(pipeline_folder, "full")
    images = policy.decode(50 * torch.randn(4, *policy.latent_shape))
    assert images.min() >= 0
    assert images.max() <= 1
    assert not images.requires_grad


def test_long_prompts_are_cut(pipeline_folder: Path) -> None:
    policy = make(pipeline_folder, "full")
    long = policy.encode(["a red circle and " * 20, "a"])["encoder_hidden_states"]
    assert long.shape == (2, 16, 16)


# ---- what is exported


def test_plain_diffusers_opens_what_is_exported(pipeline_folder: Path, tmp_path: Path) -> None:
    """Without anything of ours; `tests/integrations/test_exports_elsewhere.py` does so where loopfast is not."""
    seeds = torch.arange(3)

    def draw(policy: Policy) -> Tensor:
        schedule = transition_schedule(policy.scheduler, 4, eta=0.0)
        sampler = Sampler(policy, schedule, guidance_scale=2.0, reduction="mean", microbatch=3)
        return sampler.decode(sampler.sample(policy.encode(PROMPTS), seeds, seeds).final)

    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "eta": 0.0, "output_type": "pt"}
    for tune in TUNES:
        policy = make(pipeline_folder, tune)
        before = draw(policy)
        disturb(policy)
        policy.export(tmp_path / tune, weights(policy))
        place = pipeline_folder if tune == "lora" else tmp_path / tune
        pipeline = StableDiffusionPipeline.from_pretrained(place, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if tune == "lora":
            pipeline.load_lora_weights(tmp_path / tune)
        assert type(pipeline.scheduler) is DDIMScheduler
        theirs = pipeline(PROMPTS, latents=initial_latents(policy, seeds), **options).images
        torch.testing.assert_close(theirs, draw(policy), atol=1e-4, rtol=0)
        assert (theirs - before).abs().max() > 1e-3


def test_an_exported_pipeline_is_read_by_transformers_4(pipeline_folder: Path, tmp_path: Path) -> None:
    """By the names it looks for: of the text encoder's weights and of the tokenizer's files."""
    policy: Any = make(pipeline_folder, "full")
    policy.export(tmp_path, weights(policy))
    names = load_file(tmp_path / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    given, written = pipeline_folder / "tokenizer", tmp_path / "tokenizer"
    assert json.loads((written / "vocab.json").read_text()) == json.loads((given / "vocab.json").read_text())
    assert (written / "merges.txt").read_text() == (given / "merges.txt").read_text()
    # and it does not tell where it came from
    assert not [f for f in tmp_path.rglob("*.json") if str(pipeline_folder) in f.read_text()]


def test_an_exported_tokenizer_does_not_depend_on_what_was_encoded(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    """A finished run that is resumed writes the export again, without having encoded anything."""
    policy: Any = make(pipeline_folder, "full")
    policy.encode(["a red circle"])
    policy.export(tmp_path, weights(policy))
    tokenizer = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    assert (tokenizer["padding"], tokenizer["truncation"]) == (None, None)
    again = load_policy(ModelConfig(pretrained=str(tmp_path), device="cpu"))
    for ours, theirs in zip(policy.encode(PROMPTS).values(), again.encode(PROMPTS).values(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"attention": "xformers"},
            r"model\.attention: xformers cannot be used here: its kernels need a CUDA",
        ),
        ({"tf32": True}, r"model\.tf32: needs a CUDA device"),
    ],
)
def test_a_lever_that_cannot_work_here_says_why(
    options: dict[str, Any], reason: str, pipeline_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make(pipeline_folder, "full", **options)


def test_compiling_needs_a_compiler_and_renames_nothing(pipeline_folder: Path) -> None:
    names = set(make(pipeline_folder, "lora").trainable())
    assert set(make(pipeline_folder, "lora", compile="blocks").trainable()) == names
    without = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    for compiled in ("blocks", "whole"):
        with without, pytest.raises(ConfigError, match=r"model\.compile: needs a C\+\+ compiler on the CPU"):
            make(pipeline_folder, "lora", compile=compiled)


@pytest.mark.parametrize(("compiled", "tune"), [("blocks", "lora"), ("whole", "full")])
def test_calls_without_gradients_take_the_compiled_graph_of_those_with(
    compiled: str, tune: str, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced and differentiated as Inductor's are, without its minutes of code generation
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    plain = make(pipeline_folder, tune, dtype="bfloat16")
    policy = make(pipeline_folder, tune, dtype="bfloat16", compile=compiled)
    assert policy.performance_options["compile"] == compiled
    assert set(policy.trainable()) == set(plain.trainable())
    disturb(plain)
    disturb(policy)
    # the copy to sample from, too, takes the graph of the policy
    copied = RolloutCopy(policy, dtype=None, device=torch.device("cpu"), merge_lora=False)
    with torch.no_grad(), copied.ready():
        first = copied.policy.predict(*inputs(policy), 3.0)
        sampled = policy.predict(*inputs(policy), 3.0)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made > 0
    trained = policy.predict(*inputs(policy), 3.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
    expected = plain.predict(*inputs(policy), 3.0)
    for result in (first, sampled):
        assert all(torch.equal(found, wanted) for found, wanted in zip(result, trained, strict=True))
    torch.testing.assert_close(trained, expected, atol=0.05, rtol=0.05)
    assert [output.requires_grad for output in (first[0], sampled[0], trained[0])] == [False, False, True]
    for outputs in (trained, expected):
        sum(output.float().square().sum() for output in outputs if output is not None).backward()
    ours, theirs = ({n: p.grad for n, p in each.trainable().items()} for each in (policy, plain))
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_a_call_without_gradients_keeps_nothing_for_a_backward_pass() -> None:
    weight, modes, kept = torch.ones(2, requires_grad=True), [], []

    def function(inputs: Tensor) -> tuple[Tensor, Tensor]:
        modes.append(torch.is_grad_enabled())
        product = weight * inputs
        inner = weakref.ref(product)
        result = product.sin()
        del product
        kept.append(inner() is not None)
        return result, weight + inputs

    call = with_one_graph(function)
    with torch.no_grad():
        sampled = call(torch.ones(2))
    trained = call(torch.ones(2))
    assert modes == [True, True]
    assert kept == [False, True]
    assert [output.requires_grad for output in (*sampled, *trained)] == [False, False, True, True]
    assert all(torch.equal(first, second) for first, second in zip(sampled, trained, strict=True))


@pytest.mark.parametrize("options", [{"attention": "flash"}, {"channels_last": "on"}])
def test_performance_options_leave_the_output(options: dict[str, Any], pipeline_folder: Path) -> None:
    off: dict[str, Any] = {"attention": "sdpa", "channels_last": "off"}
    plain, faster = make(pipeline_folder, "full", **off), make(pipeline_folder, "full", **{**off, **options})
    assert plain.performance_options != faster.performance_options
    torch.testing.assert_close(outputs(faster), outputs(plain), atol=1e-5, rtol=0)


def test_recomputed_activations_have_the_same_gradient(pipeline_folder: Path) -> None:
    gradients = []
    for recompute in (False, True):
        policy: Any = make(pipeline_folder, "full")
        if recompute:
            policy.enable_gradient_checkpointing()
        policy.predict(*inputs(policy), 3.0)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable().values()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_a_released_text_encoder_has_encoded_all_and_comes_back_for_the_export(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    policy: Any = make(pipeline_folder, "full")
    expected = policy.encode(PROMPTS)["encoder_hidden_states"]
    policy.free_text_encoder(PROMPTS)
    assert policy.pipeline.text_encoder is None
    torch.testing.assert_close(policy.encode(PROMPTS)["encoder_hidden_states"], expected)
    policy.export(tmp_path, weights(policy))
    assert policy.pipeline.text_encoder is None
    again = load_policy(ModelConfig(pretrained=str(tmp_path), device="cpu"))
    torch.testing.assert_close(again.encode(PROMPTS)["encoder_hidden_states"], expected)


def test_latents_that_were_normalized_by_channel_are_decoded_as_their_autoencoder_wants(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text("utf-8"))
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    file.write_text(json.dumps(config | {"latents_mean": mean, "latents_std": std}), "utf-8")
    policy: Any = load_policy(ModelConfig(pretrained=str(folder), device="cpu"))
    latents = torch.randn(3, *policy.latent_shape)
    by_channel = torch.tensor([mean, std]).view(2, 1, -1, 1, 1)
    expected = latents * by_channel[1] / config["scaling_factor"] + by_channel[0]
    with torch.no_grad():
        images = policy.pipeline.vae.decode(expected).sample / 2 + 0.5
    torch.testing.assert_close(policy.decode(latents), images.clamp(0, 1), atol=1e-5, rtol=0)
