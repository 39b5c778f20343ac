"""Checkpoints are the same whatever the number of processes, and so is what comes out."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from loopfast.config import load_config
from loopfast.evaluation.models import newest_checkpoint, policy_of, sampler_of
from loopfast.policies import Policy, load_policy
from loopfast.policies.source import locate
from loopfast.rollout import initial_latents
from loopfast.run.console import Display
from loopfast.seeds import row_seeds
from tests.distributed.conftest import Runs, distance, saved
from tests.rounding import no_deviation

FULL = ("distributed.zero_stage=2",)
LORA = ("model.tune=lora", "distributed.zero_stage=3", "distributed.offload=all")
PROMPT = "a red circle and a blue square"


@pytest.mark.parametrize(("options", "size", "stage"), [(FULL, 3, 3), (LORA, 1, 0)], ids=["full", "lora"])
def test_what_two_processes_saved_another_number_goes_on_from(
    options: tuple[str, ...], size: int, stage: int, runs: Runs
) -> None:
    name = runs.shared(2, *options)
    again = f"{name}-{size}"
    shutil.copytree(runs.folder / name, runs.folder / again)
    shutil.rmtree(runs.folder / again / "checkpoints" / "iteration-000002")
    (runs.folder / again / "metrics.jsonl").unlink()
    offload = "distributed.offload=none"
    folder = runs.train(again, size, *options, f"distributed.zero_stage={stage}", offload, resume="auto")
    later = runs.updates(name)[2:]
    assert len(later) == 2
    for found, expected in zip(runs.updates(again), later, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
        assert found["learning_rate"] == expected["learning_rate"]
    # what samples has been made from the checkpoint, too
    assert runs.updates(again)[0]["ratio_max_deviation"] == no_deviation()
    assert distance(saved(folder), saved(runs.folder / name)) < 1e-5
    moved = saved(folder, name="iteration-000001")
    assert distance(saved(folder), moved) > 1e-4, "training has changed nothing"


STOP = """\
import os, signal, loopfast.training.train
update = loopfast.training.train.update_with_fallback
def stopped(run, state, *arguments):
    done = update(run, state, *arguments)
    if rank == 1 and state.iteration == 1 and not state.updates:
        os.kill(os.getpid(), signal.SIGTERM)
    return done
loopfast.training.train.update_with_fallback = stopped
"""


def test_a_signal_to_one_process_saves_what_all_have_sampled(runs: Runs) -> None:
    name = runs.shared(2, *FULL)
    again = f"{name}-stopped"
    runs.ranks.start(runs.arguments(again, *FULL), 2, before=STOP)
    assert runs.ranks.wait() == [130, 143]
    [line] = runs.ranks.errors(0).splitlines()
    assert line.endswith("iteration-000001-update-1 is saved, --resume auto goes on from there")
    assert runs.ranks.errors(1) == ""
    folder = runs.train(again, 1, "distributed.zero_stage=0", resume="auto")
    for found, expected in zip(runs.updates(again), runs.updates(name)[3:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    assert distance(saved(folder), saved(runs.folder / name)) < 1e-5


@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_plain_diffusers_draws_the_same_images_from_what_is_exported(
    options: tuple[str, ...], runs: Runs
) -> None:
    folder = runs.folder / runs.shared(2, *options)
    config = load_config(folder / "config.yaml")
    without_noise = config.rollout.model_copy(update={"steps": 4, "eta": 0.0})
    config = config.model_copy(update={"rollout": without_noise})
    trained, base = (
        policy_of(config, newest_checkpoint(folder, Display(quiet=True))),
        load_policy(config.model),
    )
    seeds = row_seeds(3, "sample", 0, [0], 2)

    def images(policy: Policy) -> Tensor:
        sampler = sampler_of(config, policy)
        return sampler.decode(sampler.sample(policy.encode([PROMPT]), torch.tensor([0, 0]), seeds).final)

    if (folder / "model").exists():
        pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(locate(config.model), torch_dtype=torch.float32)
        pipeline.load_lora_weights(folder / "lora")
    pipeline.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    latents = initial_latents(base, seeds)
    theirs = pipeline(
        [PROMPT] * 2, num_inference_steps=4, guidance_scale=1.0, eta=0.0, latents=latents, output_type="pt"
    ).images
    assert (images(trained) - theirs).abs().max() < 1e-5
    assert (images(base) - theirs).abs().max() > 1e-4
