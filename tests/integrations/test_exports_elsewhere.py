"""What is exported, opened by the earlier diffusers and transformers of another environment: the same images."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from loopfast.config import ModelConfig
from loopfast.policies import Policy, load_policy
from loopfast.rollout import initial_latents
from tests.families import FAMILIES, save_tiny, settings_of

PYTHON = os.environ.get("LOOPFAST_TRL_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="needs an environment with diffusers 0.39: make test-trl"
)

SCRIPT = Path(__file__).with_name("draw.py")
ADAPTERS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"dora": True}, "text": {"text_encoder": True}}
# diffusers has no load_lora_weights for PixArt
CASES = [
    *((family, "lora") for family in FAMILIES if family != "pixart"),
    ("sd", "dora"),
    ("sd", "text"),
    *((family, "full") for family in FAMILIES),
]


@torch.no_grad()
def disturb(policy: Policy) -> dict[str, torch.Tensor]:
    """Stands for training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable().values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.detach() for name, parameter in policy.trainable().items()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Of every case a folder with the images that both environments draw."""
    folder = tmp_path_factory.mktemp("exports")
    jobs, places = [], {}
    for family, kind in CASES:
        base = folder / family
        if not base.exists():
            save_tiny(family, base)
        place = places[family, kind] = folder / f"{family}-{kind}"
        tune = "full" if kind == "full" else "lora"
        lora = {"rank": 4, "alpha": 8, **ADAPTERS.get(kind, {})}
        options = settings_of(family)
        policy = load_policy(ModelConfig(pretrained=str(base), device="cpu", tune=tune, lora=lora, **options))
        policy.export(place / "export", disturb(policy))
        save_file({"latents": initial_latents(policy, torch.arange(1))}, place / "given.safetensors")
        job = {"place": str(place), "base": None if kind == "full" else str(base), "options": options}
        jobs.append(job)
        _draw(job)
    script = [str(PYTHON), "-I", str(SCRIPT), json.dumps(jobs)]
    done = subprocess.run(script, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["0.39.0", "4.57.6"]
    return places


def _draw(job: dict[str, Any]) -> None:
    namespace: dict[str, Any] = {"__name__": "draw"}
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), namespace)
    namespace["draw"](DiffusionPipeline, job, "here")


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_images_are_the_same(family: str, kind: str, drawn: dict[tuple[str, str], Path]) -> None:
    place = drawn[family, kind]
    here, elsewhere = (load_file(place / f"{where}.safetensors") for where in ("here", "elsewhere"))
    torch.testing.assert_close(elsewhere["images"], here["images"], atol=2e-5, rtol=0)
    if kind != "full":
        assert (here["images"] - here["untrained"]).abs().max() > 1e-3
