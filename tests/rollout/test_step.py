"""The denoising step: nothing in the sampling loop asks the device for a value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loopfast.policies import Policy
from loopfast.rollout import CapturedStep, DenoisingStep, StepCache, initial_latents
from tests.rollout import toy

aten: Any = torch.ops.aten


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a device: reading a number, and copying to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.copies = 0
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        packet = function.overloadpacket
        self.reads += packet in (
            aten._local_scalar_dense,
            aten.item,
            aten.nonzero,
            aten.is_nonzero,
            aten.equal,
        )
        result = function(*args, **(kwargs or {}))
        if packet in (aten._to_copy, aten.copy_, aten.copy):
            source = args[1] if packet is aten.copy_ else args[0]
            self.copies += source.device.type != "cpu" and result.device.type == "cpu"
        return result


@pytest.fixture(scope="module", params=["full", "lora"])
def policy(pipeline_folder: Path, request: pytest.FixtureRequest) -> Policy:
    return toy.load(pipeline_folder, tune=request.param)


def step_of(policy: Policy, folder: Path, guidance: float) -> DenoisingStep:
    schedule, text = toy.schedule(folder), policy.encode(toy.PROMPTS)
    text = {name: value.to(policy.device) for name, value in text.items()}
    step = DenoisingStep(policy, 5, schedule, text, guidance, "sum")
    step.load(schedule, torch.zeros_like(step.trajectory[0]), text, toy.ROWS.to(policy.device), toy.SEEDS)
    return step


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_the_loop_reads_no_number_on_the_host(policy: Policy, pipeline_folder: Path, guidance: float) -> None:
    step = CapturedStep(step_of(policy, pipeline_folder, guidance))
    with HostReads() as host:
        step.run(toy.STEPS)
    assert host.calls > 100
    assert (host.reads, host.copies) == (0, 0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_the_loop_runs_where_no_number_exists(policy: Policy, pipeline_folder: Path, guidance: float) -> None:
    """Tensors of the device "meta" have no values: an operation that needs one on the host raises."""
    meta = torch.device("meta")
    denoiser = copy.deepcopy(policy.denoiser).to(meta)
    elsewhere = policy.with_denoiser(denoiser, meta, policy.dtype, autocast=False)
    encode = policy.encode(toy.PROMPTS)
    text = {name: value.to(meta) for name, value in encode.items()}
    schedule = toy.schedule(pipeline_folder).to(meta)
    step = DenoisingStep(elsewhere, 5, schedule, text, guidance, "sum")
    with HostReads() as host:
        CapturedStep(step).run(toy.STEPS)
    assert (host.reads, host.copies) == (0, 0)
    assert step.trajectory.device == meta


def test_reading_on_the_host_is_noticed() -> None:
    with HostReads() as host:
        torch.ones(1).item()
        bool(torch.ones(1) > 0)
    assert host.reads == 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").item()


@torch.no_grad()
def test_steps_are_taken_in_fixed_memory(policy: Policy, pipeline_folder: Path) -> None:
    step = step_of(policy, pipeline_folder, 3.0)
    before = step.addresses()
    text = policy.encode(list(reversed(toy.PROMPTS)))
    step.load(
        toy.schedule(pipeline_folder), initial_latents(policy, toy.SEEDS), text, toy.ROWS, toy.SEEDS + 1
    )
    for _ in range(toy.STEPS):
        step.advance()
    assert step.addresses() == before
    assert set(before) > {"trajectory", "logprob", "model_input", "step", "timesteps", "table", "seed"}
    assert set(before) > set(policy.trainable())
    assert int(step.buffers["step"]) == toy.STEPS
    assert torch.equal(step.buffers["model_input"], step.trajectory[-1])
    assert len(step.trajectory.unique(dim=0)) == toy.STEPS + 1


def test_a_policy_whose_memory_does_not_suffice_keeps_nothing(pipeline_folder: Path) -> None:
    policy: Any = toy.load(pipeline_folder)
    predict = policy.predict

    def limited(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if len(sample) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return predict(sample, *arguments, **options)

    policy.predict = limited
    cache = StepCache()
    with pytest.raises(torch.OutOfMemoryError):
        toy.run(toy.sampler(policy, pipeline_folder, microbatch=4, steps=cache))
    assert len(cache) == 0
    found = toy.run(toy.sampler(policy, pipeline_folder, microbatch=2, steps=cache))
    assert len(cache) == 1
    del policy.predict
    whole = toy.run(toy.sampler(policy, pipeline_folder, microbatch=5))
    torch.testing.assert_close(found.latents, whole.latents, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("capture", [False, True])
@torch.no_grad()
def test_the_loop_never_waits_for_a_gpu(pipeline_folder: Path, guidance: float, capture: bool) -> None:
    policy = toy.load(pipeline_folder, device="cuda")
    schedule, text = toy.schedule(pipeline_folder).to("cuda"), policy.encode(toy.PROMPTS)
    cache = StepCache(capture=capture)
    step = cache.get(policy, 5, schedule, text, guidance, "sum")
    assert step.captured is capture
    step.step.load(schedule, initial_latents(policy, toy.SEEDS), text, toy.ROWS, toy.SEEDS)
    step.run(toy.STEPS)  # compiles kernels
    step.step.rewind()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run(toy.STEPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
