from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.errors import ConfigError
from loopfast.policies import load_policy, load_schedule, load_scheduler, trained_steps
from loopfast.policies.source import locate
from loopfast.schedules import transition_schedule

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def copy(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline's folder to spoil."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "model"))


def model(folder: Path | str, **options: Any) -> ModelConfig:
    return ModelConfig(pretrained=str(folder), device="cpu", **options)


def edit(file: Path, change: Edit) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_eta_is_one_unless_told(pipeline_folder: Path) -> None:
    config = model(pipeline_folder)
    told, default, half = (
        load_schedule(config, RolloutConfig(steps=5, eta=eta)).table64[:, 2] for eta in (1.0, None, 0.5)
    )
    assert torch.equal(told, default)
    torch.testing.assert_close(half, default / 2)


def test_noise_level_is_for_other_models(pipeline_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.noise_level belongs to flow-matching models"):
        load_schedule(model(pipeline_folder), RolloutConfig(steps=5, noise_level=0.7))


def test_steps_that_cannot_be_trained(pipeline_folder: Path) -> None:
    schedule = load_schedule(model(pipeline_folder), RolloutConfig(steps=5, eta=1.0))
    assert trained_steps(schedule, "all") == (0, 1, 2, 3, 4)
    assert trained_steps(schedule, "1:3") == (1, 2)
    with pytest.raises(ConfigError, match=r"train\.steps: "):
        trained_steps(schedule, "7:9")
    deterministic = transition_schedule(load_scheduler(model(pipeline_folder)), 5, eta=0.0)
    with pytest.raises(ConfigError, match=r"train\.steps: "):
        trained_steps(deterministic, "all")


def test_the_embedded_model_is_in_the_package() -> None:
    folder = locate(ModelConfig(pretrained="embedded"))
    assert isinstance(folder, Path)
    assert folder.parts[-3:] == ("loopfast", "embedded", "model")


def test_home_folders_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert locate(ModelConfig(pretrained="~/model")) == tmp_path / "model"


# ---- errors


def test_no_such_folder(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(ConfigError, match=r"model\.pretrained: no such folder or file: ") as error:
        load_policy(model(absent))
    assert str(absent) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    for content in ("{}", "[]", '{"_class_name": 3}'):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ConfigError, match="is no diffusers pipeline: no _class_name"):
            load_policy(model(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match="no diffusers pipeline at"):
        load_policy(model(tmp_path))


def test_another_process(copy: Path) -> None:
    change = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    edit(copy / "model_index.json", lambda index: index.update(change))
    with pytest.raises(ConfigError, match=r"is FlowMatchEulerDiscreteScheduler; supported: DDIMScheduler, "):
        load_policy(model(copy))


@pytest.mark.parametrize("content", [None, "{", "[1]", "3"])
def test_a_broken_scheduler(copy: Path, content: str | None) -> None:
    file = copy / "scheduler" / "scheduler_config.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    said = r"(cannot load the scheduler of|the configuration of) .*"
    with pytest.raises(ConfigError, match=said) as error:
        load_scheduler(model(copy))
    assert "\n" not in str(error.value)


def test_missing_weights(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.pretrained: cannot load") as error:
        load_policy(model(copy))
    assert "\n" not in str(error.value)


def test_damaged_weights(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.pretrained: cannot load"):
        load_policy(model(copy))


def test_no_such_device(pipeline_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.device: cuda:99 is not there; this machine has \d+ CUDA"):
        load_policy(ModelConfig(pretrained=str(pipeline_folder), device="cuda:99"))


def test_lora_targets_that_match_nothing(pipeline_folder: Path) -> None:
    config = model(pipeline_folder, tune="lora", lora={"targets": ["to_nowhere"]})
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: \['to_nowhere'\]: "):
        load_policy(config)
