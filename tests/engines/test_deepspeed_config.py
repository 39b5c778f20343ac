from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfast import engines
from loopfast.config import Config, parse_config
from loopfast.engines.deepspeed_file import KNOWN
from loopfast.errors import ConfigError

LARGE = 860_000_000


def config(*overrides: str) -> Config:
    return parse_config("model: {pretrained: embedded, dtype: bfloat16}", overrides)


def deepspeed_settings(config: Config, parameters: int, **options: bool) -> dict[str, Any]:
    return engines.deepspeed_settings(
        config.train, config.distributed, config.model.dtype, parameters, **options
    )


def with_file(tmp_path: Path, content: Any, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_settings(config(f"distributed.deepspeed={file}", *overrides), LARGE)


def test_a_run_alone_needs_none() -> None:
    assert not config().distributed.needs_deepspeed(1)
    assert config().distributed.needs_deepspeed(2)
    assert config("distributed.zero_stage=1").distributed.needs_deepspeed(1)
    assert config("distributed.deepspeed=x.json").distributed.needs_deepspeed(1)


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
    ("key", "found", "said"),
    [
        ("zero_optimization.stage", 2, '3 or "auto" with distributed.zero_stage: 3'),
        ("zero_optimization.stage", True, '3 or "auto" with distributed.zero_stage: 3'),
        ("zero_optimization.offload_param.device", "nvme", '"none" or "auto" with distributed.offload: none'),
        (
            "zero_optimization.offload_optimizer.device",
            "cpu",
            '"none" or "auto" with distributed.offload: none',
        ),
        ("zero_optimization.cpu_offload", True, 'false or "auto" with distributed.offload: none'),
        ("gradient_clipping", 2.0, '1.0 or "auto" with train.max_grad_norm: 1.0'),
        ("fp16.enabled", True, 'false or "auto" with model.dtype: bfloat16'),
        ("bf16.enabled", False, 'true or "auto" with model.dtype: bfloat16'),
        ("bf16.check_grad_overflow", False, 'true or "auto" with model.dtype: bfloat16'),
        ("torch_autocast.enabled", True, 'false or "auto" with model.dtype: bfloat16'),
        ("optimizer.type", "Adam", '"AdamW" or "auto" with train.optimizer: adamw'),
        ("optimizer.params.lr", 0.5, '0.00015 or "auto" with train.learning_rate: 0.00015'),
        (
            "optimizer.params.betas",
            [0.9, 0.999],
            '[0.9, 0.99] or "auto" with train.beta1: 0.9, train.beta2: 0.99',
        ),
        ("optimizer.params.torch_adam", True, '"auto" with train.optimizer: adamw'),
        ("optimizer.params", 3, "a section {...}"),
        ("scheduler.type", "WarmupDecayLR", '"WarmupLR" or "auto" with train.lr_schedule: constant'),
        ("scheduler.params.warmup_num_steps", 9, '10 or "auto" with train.warmup_updates: 10'),
        ("train_batch_size", 64, '"auto" with train.updates_per_iteration: 4'),
        ("gradient_accumulation_steps", 4, '1 or "auto" with train.microbatch: auto'),
        ("gradient_allreduce_op", "sum", '"mean" or "auto" with loopfast\'s engine'),
        ("zero_allow_untested_optimizer", False, 'true or "auto" with train.optimizer: adamw'),
    ],
)
def test_a_contradiction_names_both(key: str, found: Any, said: str, tmp_path: Path) -> None:
    content = found
    for part in reversed(key.split(".")):
        content = {part: content}
    with pytest.raises(ConfigError) as caught:
        with_file(tmp_path, content, "distributed.zero_stage=3")
    file = tmp_path / "ds.json"
    assert (
        str(caught.value)
        == f"distributed.deepspeed: {file}, {key}: found {json.dumps(found)}, allowed: {said}"
    )


# As people bring it from Hugging Face's trainer.
AUTO: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_file_in_which_all_is_auto_is_taken(tmp_path: Path) -> None:
    overrides = ("distributed.zero_stage=2", "distributed.offload=optimizer")
    settings = with_file(tmp_path, AUTO, *overrides)
    ours = deepspeed_settings(config(*overrides), LARGE)
    # the trainer has an optimizer and a schedule of its own
    assert settings.keys() - ours.keys() == {"fp16", "steps_per_print", "wall_clock_breakdown"}
    assert settings["fp16"] == {"loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}
    zero = {"allgather_bucket_size": 2e8, "overlap_comm": True}
    zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    assert settings["zero_optimization"] == ours["zero_optimization"] | zero
    del settings["fp16"], settings["steps_per_print"], settings["wall_clock_breakdown"]
    assert {key: settings[key] for key in ours if key != "zero_optimization"} == {
        key: ours[key] for key in ours if key != "zero_optimization"
    }


@pytest.mark.parametrize(
    "same",
    [
        {"optimizer": {"type": "adamw", "params": {"lr": 1.5e-4, "betas": [0.9, 0.99], "eps": 1e-8}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1.5e-4}}},
        {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "torch_autocast": {"enabled": False}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "cpu_offload": False}},
        # sections that hold nothing, and what is not set
        {"zero_optimization": {}, "fp16": {}, "optimizer": {}, "scheduler": {}},
        {"zero_optimization": {"offload_optimizer": {}, "stage": None}},
        {"zero_optimization": None, "gradient_clipping": None, "steps_per_print": None},
        {"zero_optimization": "auto"},
    ],
)
def test_what_says_the_same_or_nothing_changes_nothing(same: dict[str, Any], tmp_path: Path) -> None:
    ours = deepspeed_settings(config("distributed.zero_stage=3"), LARGE)
    assert with_file(tmp_path, same, "distributed.zero_stage=3") == ours


def test_its_own_settings_are_a_file_that_changes_nothing(tmp_path: Path) -> None:
    for overrides in (["distributed.zero_stage=3", "distributed.offload=all"], ["model.dtype=float16"], []):
        ours = deepspeed_settings(config(*overrides), LARGE)
        assert with_file(tmp_path, ours, *overrides) == ours


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not valid JSON: Expecting value"),
        ("{", "is not valid JSON"),
        ("[1]", "holds no object, but [1]"),
        ('{"a": NaN}', "is not valid JSON: NaN is no number of JSON"),
        ('{"gradient_clipping": 1e999}', "gradient_clipping: found a number that is too large"),
        ('{"fp16": {}, "fp16": {}}', 'is not valid JSON: key "fp16" is given twice'),
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', 'key "stage" is given twice'),
        ("[" * 100_000, "is nested too deeply"),
        ('{"fp16": ' * 40 + "1" + "}" * 40, "nested too deeply"),
        ('{"aio": ' + "9" * 5000 + "}", "is not valid JSON: "),
        (
            '{"zero_optimisation": {}}',
            ': unknown key "zero_optimisation"; nearest known key: zero_optimization',
        ),
        ('{"zero": {"stage": 2}}', ': unknown key "zero"; nearest known key: '),
        ('{"a\\nb": 1}', 'unknown key "a\\nb"; nearest'),
        ('{"zero_optimization": false}', "zero_optimization: found false, allowed: a section {...}, null or"),
        ('{"zero_optimization": true}', "zero_optimization: found true, allowed: a section {...}, null or"),
        ('{"bf16": 0}', "bf16: found 0, allowed: a section {...}"),
        ('{"fp16": "on"}', 'fp16: found "on", allowed: a section {...}'),
        ('{"flops_profiler": [1]}', "flops_profiler: found [1], allowed: a section {...}"),
        ('{"steps_per_print": 0}', "steps_per_print: found 0, allowed: a number above 0"),
        ('{"steps_per_print": {"a": 1}}', 'steps_per_print: found {"a": 1}, allowed: a number above 0'),
        ('{"wall_clock_breakdown": 1}', "wall_clock_breakdown: found 1, allowed: true or false"),
        ('{"communication_data_type": 16}', "communication_data_type: found 16, allowed: text"),
        ('{"gradient_clipping": "1.0"}', 'gradient_clipping: found "1.0", allowed: a number, without quotes'),
        (
            '{"zero_optimization": {"reduce_bucket_size": "5e8"}}',
            'zero_optimization.reduce_bucket_size: found "5e8", allowed: a number, without quotes',
        ),
        (
            '{"zero_optimization": {"reduce_bucket_size": {"a": 1}}}',
            "zero_optimization.reduce_bucket_size.a: found 1, allowed: no section at reduce_bucket_size",
        ),
    ],
)
def test_a_file_that_is_none(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distributed\.deepspeed: ") as caught:
        with_file(tmp_path, content, "distributed.zero_stage=3")
    assert said in str(caught.value)
    assert str(tmp_path / "ds.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.json: No such file"):
        deepspeed_settings(config("distributed.deepspeed=nowhere.json"), LARGE)
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        deepspeed_settings(config(f"distributed.deepspeed={tmp_path}"), LARGE)
    with pytest.raises(ConfigError, match=r"cannot read /dev/zero: File too large"):
        deepspeed_settings(config("distributed.deepspeed=/dev/zero"), LARGE)
    file = tmp_path / "ds.json"
    for data in ('{"aio": "é"}'.encode("latin-1"), '{"aio": {}}'.encode("utf-16")):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"is not text in UTF-8 \(byte \d+\)"):
            deepspeed_settings(config(f"distributed.deepspeed={file}"), LARGE)


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    assert with_file(tmp_path, '\ufeff{"steps_per_print": 7}')["steps_per_print"] == 7


def test_names_of_trackers_may_look_like_numbers(tmp_path: Path) -> None:
    content = {"tensorboard": {"enabled": False, "job_name": "2024"}}
    assert with_file(tmp_path, content)["tensorboard"]["job_name"] == "2024"


NAMES = (
    st.sampled_from([*KNOWN, "stage", "params", "type", "enabled", "offload_optimizer", "device", ""])
    | st.text()
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["auto", "5e8", "cpu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


SHARDED = config("distributed.deepspeed=given.json", "distributed.zero_stage=3")


@given(content=VALUES | st.dictionaries(NAMES, VALUES, max_size=4))
def test_whatever_a_file_holds_is_taken_or_refused_in_one_line(content: Any) -> None:
    with patch("loopfast.engines.deepspeed_file.read_settings", lambda *_: json.dumps(content)):
        try:
            found = deepspeed_settings(SHARDED, LARGE)
        except ConfigError as error:
            message = str(error)
            assert message.startswith("distributed.deepspeed: given.json")
            assert message.isprintable()
            assert message.isascii()
            return
    assert found["zero_optimization"]["stage"] == 3
    json.dumps(found, allow_nan=False)


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
