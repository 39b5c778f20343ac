from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.planning.check_memory import RUN, planned, run
from loopfast.config import Config, parse_config
from loopfast.planning import load_architecture
from loopfast.planning.memory import Footprint, Resources, footprint, trained_steps

GIB = 2**30
CARD = Resources("cuda", 24 * GIB)


def config(*overrides: str) -> Config:
    text = "{model: {pretrained: embedded}, rollout: {microbatch: 4}, train: {microbatch: 4}}"
    return parse_config(text, overrides)


def of(model: str | None, *overrides: str, gpus: int = 1, stage: int | None = None) -> Footprint:
    there = config(*overrides)
    return footprint(there, load_architecture(there.model, model), Resources("cuda", 80 * GIB, gpus), stage)


@pytest.mark.parametrize("overrides", [[], ["model.tune=lora"]])
def test_the_replay_holds_the_tensors_that_are_planned(
    shallow_folder: Path, tmp_path: Path, overrides: list[str]
) -> None:
    text = RUN.replace("MODEL", str(shallow_folder)).replace("DEVICE", "cpu")
    settings = [*overrides, f"run.directory={tmp_path}", "rollout.steps=2", "train.microbatch=2"]
    settings += ["rollout.microbatch=2", "train.on_policy_check=off", "evaluation.limit_prompts=1"]
    # two calls, the second of which adds to gradients
    settings += ["rollout.prompts_per_iteration=1", "train.updates_per_iteration=1"]
    assert planned(text, settings)["tensors"] == pytest.approx(run(text, settings, tensors=True), rel=0.03)


def test_weights_gradients_and_moments_of_full_tuning() -> None:
    found, count = of("sd15"), 859_520_964
    assert found.held["denoiser"] == 4 * count
    assert found.held["optimizer"] == 8 * count
    assert found.phases["replay"]["gradients"] == 4 * count
    assert found.held["text encoders"] == 4 * 123_060_480
    assert found.held["autoencoder"] == 4 * 83_653_863


def test_an_adapter_leaves_the_weights_in_their_type() -> None:
    found, count = of("sd15", "model.tune=lora", "model.dtype=bfloat16", "model.lora.rank=4"), 859_520_964
    assert found.held["denoiser"] == 2 * count
    # four projections of 32 attentions of rank 4
    assert found.held["adapter"] == 4 * 797_184
    assert found.held["optimizer"] == 8 * 797_184


def test_a_decoder_in_the_models_type_holds_half() -> None:
    half = ("model.dtype=bfloat16", "rollout.microbatch=4")
    exact, found = (of("sd15", *half, f"model.decoder_precision={name}") for name in ("tf32", "model"))
    assert 2 * found.held["autoencoder"] == exact.held["autoencoder"]
    decoders = [each.phases["decoding"]["decoder"] for each in (found, exact)]
    assert 0.4 * decoders[1] < decoders[0] < 0.7 * decoders[1]


def test_each_stage_shards_more() -> None:
    by_stage = [of("sd15", "model.dtype=bfloat16", gpus=8, stage=stage) for stage in range(4)]
    count = 859_520_964
    assert [found.held["denoiser"] for found in by_stage] == [4 * count, 2 * count, 2 * count, 2 * count // 8]
    assert [found.held["optimizer"] for found in by_stage] == [8 * count, *[8 * count // 8] * 3]
    assert "float32 weights" not in by_stage[0].held
    assert by_stage[1].held["float32 weights"] == 4 * count // 8
    assert [found.phases["replay"]["gradients"] for found in by_stage[1:]] == [
        2 * count + count // 2,
        count // 2,
        count // 2,
    ]
    replays = [found.in_phase("replay") for found in by_stage]
    assert replays == sorted(replays, reverse=True)
    # the copy to sample from is there while images are sampled, and only then
    assert by_stage[3].phases["rollout"]["rollout replica"] == 2 * count
    assert "rollout replica" not in by_stage[3].phases["replay"]


def test_what_is_offloaded_waits_on_the_host() -> None:
    stages = ["distributed.zero_stage=3"]
    here, optimizer, everything = (
        of("sd15", *stages, f"distributed.offload={value}", gpus=4) for value in ("none", "optimizer", "all")
    )
    assert here.total > optimizer.total > everything.total
    assert optimizer.host["optimizer"] == 4 * here.held["optimizer"]
    assert {"denoiser", "optimizer"} <= everything.host.keys() - everything.held.keys()


@pytest.mark.parametrize(
    "override",
    [
        "train.gradient_checkpointing=true",
        "train.optimizer=adamw_8bit",
        "model.dtype=bfloat16",
        "model.tune=lora",
        "model.free_text_encoder=true",
        "rollout.guidance_scale=1.0",
        "train.microbatch=2",
    ],
)
def test_a_setting_saves(override: str) -> None:
    guided = "rollout.guidance_scale=3.0"
    assert of(None, guided, override).total < of(None, guided).total


def test_tiles_and_the_host_save_where_they_act() -> None:
    whole, tiles = config(), config("model.vae_tiling=true")
    architecture = load_architecture(whole.model, "sd15")
    # images of the size that the autoencoder was trained at are decoded whole in any case
    small = {**architecture.vae.config, "sample_size": 256}
    architecture = replace(architecture, vae=replace(architecture.vae, config=small))
    plain, tiled = (footprint(there, architecture, CARD) for there in (whole, tiles))
    assert tiled.phases["decoding"]["decoder"] < 0.6 * plain.phases["decoding"]["decoder"]
    kept, moved = of("sd15"), of("sd15", "trajectories.device=host")
    assert "trajectories" not in moved.phases["replay"]
    assert moved.host["trajectories"] == kept.phases["replay"]["trajectories"]


def test_the_reference_is_a_copy_of_all_weights_only() -> None:
    held = of(None, "algorithm.kl_weight=0.1").held
    assert held["reference"] == held["denoiser"]
    assert "reference" not in of(None, "algorithm.kl_weight=0.1", "model.tune=lora").held


def test_automatic_microbatches_halve_until_they_fit() -> None:
    automatic = ("rollout.microbatch=auto", "train.microbatch=auto")
    there = config(*automatic, "model.tune=lora", "model.dtype=bfloat16", "model.lora.rank=4")
    found = footprint(there, load_architecture(there.model, "sd15"), CARD)
    # 128 images; 64 latents of 4×64×64 to start with on a GPU
    assert found.batch.rollout == found.batch.replay == 16
    assert found.total <= CARD.memory


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 10),
        (["train.steps=1:5"], 4),
        (["rollout.stochastic_steps=window:3"], 3),
        (["rollout.stochastic_steps=0:6", "train.steps=2:"], 4),
        (["train.step_fraction=0.5"], 5),
    ],
)
def test_steps_that_are_trained_on(overrides: list[str], steps: int) -> None:
    assert trained_steps(config(*overrides)) == steps
