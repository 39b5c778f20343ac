"""Recordings of the denoising step: their cache, what makes one stale, and the loop without them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from loopfast.policies import Policy
from loopfast.rollout import CapturedStep, StepCache
from loopfast.rollout.capture import CHECK_ADDRESSES
from loopfast.rollout.recording import Recorder
from tests.rollout import toy


@pytest.fixture(scope="module")
def policy(pipeline_folder: Path) -> Policy:
    return toy.load(pipeline_folder, tune="lora", lora={"rank": 2})


def get(cache: StepCache, policy: Policy, folder: Path, /, **changes: Any) -> CapturedStep:
    arguments = {
        "policy": policy,
        "rows": 3,
        "schedule": toy.schedule(folder),
        "conditioning": policy.encode(toy.PROMPTS),
        "guidance_scale": 2.0,
        "reduction": "sum",
    }
    return cache.get(**{**arguments, **changes})


def test_a_step_is_made_once_for_what_it_depends_on(policy: Policy, pipeline_folder: Path) -> None:
    cache = StepCache()
    first = get(cache, policy, pipeline_folder)
    # another noise, and any number of other prompts
    noise = toy.schedule(pipeline_folder, eta=0.5)
    assert get(cache, policy, pipeline_folder, schedule=noise) is first
    assert get(cache, policy, pipeline_folder, conditioning=policy.encode(["a star"] * 9)) is first
    toy.move(policy)
    assert get(cache, policy, pipeline_folder) is first
    text = {name: value.bfloat16() for name, value in policy.encode(toy.PROMPTS).items()}
    others = [
        get(cache, policy, pipeline_folder, **change)
        for change in (
            {"rows": 4},
            {"guidance_scale": 1.0},
            {"guidance_scale": 3.0},
            {"reduction": "mean"},
            {"conditioning": text},
            {"policy": policy.with_denoiser(policy.denoiser, policy.device, torch.bfloat16, autocast=True)},
        )
    ]
    assert len({id(step) for step in (first, *others)}) == len(others) + 1 == len(cache)


def test_a_step_is_made_anew_when_the_adapter_or_the_weights_are_others(
    policy: Policy, pipeline_folder: Path
) -> None:
    cache = StepCache()
    first = get(cache, policy, pipeline_folder)
    with policy.reference():
        without = get(cache, policy, pipeline_folder)
    assert without is not first
    again = get(cache, policy, pipeline_folder)
    assert again is not without
    layer: Any = next(m for m in policy.denoiser.modules() if getattr(m, "scaling", None))
    layer.scaling["loopfast"] *= 2
    stronger = get(cache, policy, pipeline_folder)
    layer.scaling["loopfast"] /= 2
    assert stronger is not again
    parameter = next(iter(policy.trainable().values()))
    before = get(cache, policy, pipeline_folder)
    held, parameter.data = parameter.data, parameter.data.clone()
    after = get(cache, policy, pipeline_folder)
    assert after is not before
    del held
    assert len(cache) == 1


def test_what_moved_is_named_before_a_replay_reads_the_old_place(
    policy: Policy, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECK_ADDRESSES, "1")
    step = get(StepCache(), policy, pipeline_folder)
    monkeypatch.delenv(CHECK_ADDRESSES)
    unchecked = get(StepCache(), policy, pipeline_folder)
    with torch.no_grad():
        step.run(1)
    name, parameter = next(iter(policy.trainable().items()))
    held, parameter.data = parameter.data, parameter.data.clone()
    with pytest.raises(RuntimeError) as caught, torch.no_grad():
        step.run(1)
    assert str(caught.value).startswith(f"{name} moved in memory after the denoising step was recorded")
    with torch.no_grad():
        unchecked.run(1)
    parameter.data = held


def test_a_recording_that_fails_is_told_once_and_done_without(policy: Policy, pipeline_folder: Path) -> None:
    """Fails for real: a CPU's work has no graphs."""
    said: list[str] = []
    step = get(StepCache(), policy, pipeline_folder).step
    failed = CapturedStep(step, recorder=Recorder(torch.device("cpu")), warn=said.append)
    assert not failed.captured
    [reason] = said
    assert reason.startswith("the denoising step cannot be captured in a CUDA graph and runs without one: ")
    assert len(reason.splitlines()) == 1
    step.rewind()
    with torch.no_grad():
        failed.run(toy.STEPS)
    assert len(said) == 1
    assert int(step.buffers["step"]) == toy.STEPS


def test_on_a_cpu_nothing_is_recorded_and_nothing_said(policy: Policy, pipeline_folder: Path) -> None:
    said: list[str] = []
    cache = StepCache(capture=True, warn=said.append)
    made = toy.sampler(policy, pipeline_folder, steps=cache)
    first = toy.run(made)
    assert toy.same(toy.run(made), first)
    assert len(cache) == 1
    assert said == []
    made.release()
    assert len(cache) == 0
    assert toy.same(toy.run(made), first)


def test_buffers_are_kept_between_samplings_and_freed_on_request(
    policy: Policy, pipeline_folder: Path
) -> None:
    cache = StepCache()
    step = get(cache, policy, pipeline_folder)
    buffers = [id(tensor) for tensor in step.step.buffers.values()]
    assert [id(tensor) for tensor in get(cache, policy, pipeline_folder).step.buffers.values()] == buffers
    store = weakref.ref(step.step.trajectory)
    del step
    cache.release()
    gc.collect()
    assert store() is None


@pytest.fixture(params=["full", "lora"])
def on_gpu(pipeline_folder: Path, request: pytest.FixtureRequest) -> Policy:
    made = toy.load(pipeline_folder, device="cuda", tune=request.param, dtype="bfloat16")
    toy.move(made)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_replays_give_the_bits_of_the_eager_loop(
    on_gpu: Policy, pipeline_folder: Path, guidance: float
) -> None:
    said: list[str] = []
    eager = toy.sampler(on_gpu, pipeline_folder, guidance, steps=StepCache(capture=False))
    captured = toy.sampler(on_gpu, pipeline_folder, guidance, steps=StepCache(warn=said.append))
    expected = toy.run(eager)
    assert toy.same(toy.run(captured), expected)
    assert toy.same(toy.run(captured), expected)
    toy.move(on_gpu)
    assert toy.same(toy.run(captured), toy.run(eager))
    assert said == []


@pytest.mark.gpu
def test_the_graph_is_recorded_anew_when_weights_move(on_gpu: Policy, pipeline_folder: Path) -> None:
    made = toy.sampler(on_gpu, pipeline_folder)
    toy.run(made)
    for parameter in on_gpu.trainable().values():
        parameter.data = 2 * parameter.data
    expected = toy.run(toy.sampler(on_gpu, pipeline_folder, steps=StepCache(capture=False)))
    assert toy.same(toy.run(made), expected)


@pytest.mark.gpu
def test_the_memory_of_graphs_is_given_back(on_gpu: Policy, pipeline_folder: Path) -> None:
    made = toy.sampler(on_gpu, pipeline_folder)
    # the recording's stream stays, and so do the libraries' workspaces for it
    toy.run(made)
    made.release()
    toy.run(toy.sampler(on_gpu, pipeline_folder, steps=StepCache(capture=False)))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    toy.run(made)
    assert torch.cuda.memory_reserved() > before
    made.release()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
