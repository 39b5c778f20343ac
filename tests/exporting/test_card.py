"""The code on a model card, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from loopfast.config import Config, ModelConfig, RolloutConfig
from loopfast.exporting.card import write_card
from loopfast.policies import load_policy
from loopfast.run.checkpoints import Checkpoint
from tests.families import settings_of
from tests.original_layout import save_single_file


def run_card(model: ModelConfig, folder: Path, *, whole: bool, base: Path | None) -> Image.Image:
    """The image that the card's code draws. Its paths lead to what was exported and to the base."""
    policy = load_policy(model)
    weights = {name: parameter.detach() for name, parameter in policy.trainable().items()}
    (policy.export_merged if whole else policy.export)(folder / "PATH" / "TO" / "THIS" / "FOLDER", weights)
    config = Config(model=model, rollout=RolloutConfig(steps=2, guidance_scale=2.0))
    checkpoint = Checkpoint(folder, 1, 0, {}, {})
    (folder / "metrics.jsonl").write_text("")
    card = write_card(folder, folder / "PATH" / "TO" / "THIS" / "FOLDER", config, checkpoint, full=whole)
    if base is not None:
        (folder / base.name).symlink_to(base)
    code = re.search(r"```python\n(.*?)```", card.read_text("utf-8"), re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code.group(1), found)
    image: Image.Image = found["image"]
    return image


@pytest.mark.parametrize(
    ("family", "dtype", "whole"),
    [
        ("embedded", "float32", False),
        ("embedded", "float32", True),
        ("embedded", "bfloat16", False),
        ("sd", "float32", False),
        ("sdxl", "float32", False),
        ("sd3", "float32", False),
        ("flux", "float32", False),
        ("pixart", "float32", False),
        ("sd", "bfloat16", True),
    ],
)
def test_the_code_on_a_card_runs(
    family: str,
    dtype: str,
    whole: bool,
    family_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = None if family == "embedded" else family_folder(family)
    options = {
        **(settings_of(family) if base else {}),
        "height": 32,
        "width": 32,
        "dtype": dtype,
        "device": "cpu",
    }
    model = ModelConfig(pretrained=str(base or "embedded"), tune="lora", **options)
    assert run_card(model, tmp_path, whole=whole, base=base).size == (32, 32)


def test_the_code_of_a_single_files_lora_runs(
    family_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = family_folder("sd")
    (tmp_path / folder.name).symlink_to(folder)
    file = save_single_file(DiffusionPipeline.from_pretrained(folder), tmp_path / "a.safetensors")
    model = ModelConfig(pretrained=str(file), config=str(folder), tune="lora", device="cpu")
    assert run_card(model, tmp_path, whole=False, base=None).size == (32, 32)
