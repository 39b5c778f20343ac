"""The denoising step of every family of models runs where no number exists, as a captured graph demands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.policies import load_policy, load_schedule
from loopfast.rollout import DenoisingStep, Sampler, StepCache
from tests.families import FAMILIES, settings_of
from tests.rollout import toy

OPTIONS = {"text encoder": {"lora": {"text_encoder": True}}, "DoRA": {"lora": {"dora": True}}}
CASES = [*((family, None) for family in FAMILIES), *(("sd-v", option) for option in OPTIONS)]


def configure(family: str, option: str | None, place: Path, device: str) -> ModelConfig:
    options = {**settings_of(family), **OPTIONS.get(option or "", {})}
    return ModelConfig.model_validate({"pretrained": str(place), "device": device, "tune": "lora", **options})


class Uploads(TorchDispatchMode):
    """Counts copies from the host's memory to a device: a graph cannot hold those of memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            self.count += source.device.type == "cpu" and result.device.type != "cpu"
        return result


# The blocks of sd35 are diffusers' own, and its step is that of sd3.
@pytest.mark.parametrize(("family", "option"), [case for case in CASES if case != ("sd35", None)])
@torch.no_grad()
def test_the_loop_runs_where_no_number_exists(family: str, option: str | None, family_folder: Any) -> None:
    """Tensors of the device "meta" have no values: an operation that needs one on the host raises."""
    meta = torch.device("meta")
    config = configure(family, option, family_folder(family), "cpu")
    policy = load_policy(config)
    denoiser = copy.deepcopy(policy.denoiser).to(meta)
    elsewhere = policy.with_denoiser(denoiser, meta, policy.dtype, autocast=False)
    text = {name: value.to(meta) for name, value in policy.encode(toy.PROMPTS).items()}
    schedule = load_schedule(config, RolloutConfig(steps=2)).to(meta)
    step = DenoisingStep(elsewhere, 5, schedule, text, 3.0, "sum")
    with Uploads() as uploads:
        step.advance()
    assert uploads.count == 0
    assert step.trajectory.shape == (3, 5, *policy.latent_shape)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "option"), CASES)
def test_replays_give_the_bits_of_the_eager_loop(family: str, option: str | None, family_folder: Any) -> None:
    config = configure(family, option, family_folder(family), "cuda")
    policy = load_policy(config)
    toy.move(policy)
    schedule = load_schedule(config, RolloutConfig(steps=3)).to(policy.device)
    said: list[str] = []
    eager, captured = (
        Sampler(policy, schedule, 3.0, "sum", 3, steps=steps)
        for steps in (StepCache(capture=False), StepCache(warn=said.append))
    )
    assert toy.same(toy.run(captured), toy.run(eager))
    assert said == []
