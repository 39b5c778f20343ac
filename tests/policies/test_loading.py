from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from loopfast.config import ModelConfig, RolloutConfig
from loopfast.errors import ConfigError
from loopfast.policies import load_policy, load_schedule, load_scheduler, trained_steps
from loopfast.policies.source import locate
from loopfast.schedules import transition_schedule

PROCESS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

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


def give_scheduler(folder: Path, scheduler: Any, drop: tuple[str, ...] = ()) -> None:
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    name = type(scheduler).__name__
    edit(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", name]))

    def without(config: dict[str, Any]) -> None:
        for key in drop:
            config.pop(key, None)

    edit(folder / "scheduler" / "scheduler_config.json", without)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_other_samplers_of_the_process_become_ddim(copy: Path, kind: Any) -> None:
    given = kind(**PROCESS, steps_offset=1, prediction_type="v_prediction")
    give_scheduler(copy, given, drop=("clip_sample",))
    scheduler = load_scheduler(model(copy))
    assert type(scheduler) is DDIMScheduler
    # DDIM's own default would clip, which the model's own sampler never did
    assert scheduler.config.clip_sample is False
    assert scheduler.config.steps_offset == 1
    assert scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, given.alphas_cumprod)
    schedule = load_schedule(model(copy), RolloutConfig(steps=10))
    assert len(schedule) == 10


def test_what_the_configuration_says_of_clipping_is_respected(copy: Path) -> None:
    give_scheduler(copy, DDIMScheduler(**PROCESS, clip_sample=True))
    with pytest.raises(ConfigError, match=r"the scheduler of '.*' cannot be used: .*clip_sample"):
        load_schedule(model(copy), RolloutConfig(steps=10))


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


@pytest.mark.parametrize("content", [None, "{"])
def test_a_broken_scheduler(copy: Path, content: str | None) -> None:
    file = copy / "scheduler" / "scheduler_config.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(ConfigError, match="cannot load the scheduler of"):
        load_scheduler(model(copy))


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
