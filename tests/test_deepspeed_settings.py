from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopfast.config import Config, parse_config
from loopfast.engines import deepspeed_settings, needs_deepspeed
from loopfast.errors import ConfigError

LARGE = 860_000_000


def config(*overrides: str) -> Config:
    return parse_config("model: {pretrained: embedded, dtype: bfloat16}", overrides)


def with_file(tmp_path: Path, content: Any, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_settings(config(f"distributed.deepspeed={file}", *overrides), LARGE)


def test_a_run_alone_needs_none() -> None:
    assert not needs_deepspeed(config(), 1)
    assert needs_deepspeed(config(), 2)
    assert needs_deepspeed(config("distributed.zero_stage=1"), 1)
    assert needs_deepspeed(config("distributed.deepspeed=x.json"), 1)


def test_what_the_configuration_decides() -> None:
    settings = deepspeed_settings(
        config("distributed.zero_stage=3", "distributed.offload=all", "train.max_grad_norm=0.5"),
        LARGE,
        pinned=True,
    )
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"]
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["stage3_max_live_parameters"] == LARGE // 20
    assert zero["reduce_bucket_size"] == LARGE // 40
    # buffers of a small model are small, and of a huge one no larger than they need to be
    small = deepspeed_settings(config("distributed.zero_stage=3"), 1000)["zero_optimization"]
    assert small["reduce_bucket_size"] == 100_000
    huge = deepspeed_settings(config("distributed.zero_stage=3"), 10**11)["zero_optimization"]
    assert huge["stage3_max_live_parameters"] == 200_000_000


@pytest.mark.parametrize(
    ("dtype", "stage", "keys"),
    [
        ("float32", 3, set()),
        ("bfloat16", 0, set()),  # the weights stay float32, and autocast computes
        ("bfloat16", 1, {"bf16"}),
        ("bfloat16", 2, {"bf16", "data_types"}),
        ("float16", 1, {"fp16", "data_types"}),
    ],
)
def test_types(dtype: str, stage: int, keys: set[str]) -> None:
    settings = deepspeed_settings(config(f"model.dtype={dtype}", f"distributed.zero_stage={stage}"), LARGE)
    assert settings.keys() & {"bf16", "fp16", "data_types"} == keys


def test_a_file_adds_what_is_not_decided(tmp_path: Path) -> None:
    settings = with_file(
        tmp_path,
        {
            "train_batch_size": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 5},
            "communication_data_type": "fp32",
        },
        "distributed.zero_stage=2",
    )
    assert settings["communication_data_type"] == "fp32"
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert settings["zero_optimization"]["reduce_bucket_size"] == 5
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["bf16"]["enabled"] is True
    assert "train_batch_size" not in settings


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage to 2, which distributed.zero_stage decides (3)",
        ),
        ({"gradient_clipping": 2.0}, "gradient_clipping to 2.0, which train.max_grad_norm decides (1.0)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled to true, which model.dtype decides (not set)"),
        ({"bf16": {"enabled": False}}, "bf16.enabled to false, which model.dtype decides"),
        (
            {"optimizer": {"type": "Adam"}},
            'optimizer.type to "Adam", which train.optimizer, learning_rate, beta1',
        ),
        ({"train_batch_size": 64}, "train_batch_size to 64, which train.updates_per_iteration"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4, which train.microbatch"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'offload_optimizer.device to "cpu", which distributed.offload decides (not set)',
        ),
    ],
)
def test_a_contradiction_names_both(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        with_file(tmp_path, content, "distributed.zero_stage=3")
    assert str(caught.value).startswith(f"distributed.deepspeed: {tmp_path / 'ds.json'} sets ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is not valid JSON"), ("[1]", "holds no object, but [1]")]
)
def test_a_file_that_is_none(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distributed\.deepspeed: ") as caught:
        with_file(tmp_path, content)
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.json"):
        deepspeed_settings(config("distributed.deepspeed=nowhere.json"), LARGE)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["distributed.offload=all", "distributed.zero_stage=2"],
            "zero_stage: found 2, allowed: 3 or more with distributed.offload: all",
        ),
        (["distributed.offload=optimizer"], "allowed: 1 or more with distributed.offload: optimizer"),
        (
            ["train.optimizer=adamw_8bit", "distributed.zero_stage=1"],
            "train.optimizer: found 'adamw_8bit', allowed: adamw with distributed.zero_stage above 0",
        ),
        (
            ["model.compile=blocks", "distributed.zero_stage=3"],
            "model.compile: found 'blocks', allowed: off with distributed.zero_stage: 3",
        ),
        (
            ["model.tune=lora", "rollout.merge_lora=true", "rollout.replica=gathered"],
            "rollout.replica: found 'gathered', allowed: auto or resident with rollout.merge_lora",
        ),
        (["rollout.replica=none", "rollout.dtype=float16"], "resident or gathered beside rollout.dtype"),
    ],
)
def test_keys_that_do_not_go_together(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert said in str(caught.value)
