"""Sixteen-bit types, errors and settings of DeepSpeed's engine, by a group of one process."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from loopfast.system.processor import has_kernels
from tests.distributed.conftest import NO_REPORT, Runs, distance, saved
from tests.rounding import no_deviation


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, ("model.dtype=bfloat16", "model.tune=lora")),
        (2, ("model.dtype=float16", "model.tune=lora")),
        (3, ("model.dtype=bfloat16", "model.tune=full")),
    ],
)
def test_sixteen_bits_are_trained_on_policy_and_resumed_bitwise(
    stage: int, options: tuple[str, ...], runs: Runs
) -> None:
    # an update an iteration, in one call
    sizes = ("rollout.microbatch=9", "train.updates_per_iteration=1", "train.microbatch=18")
    options = (f"distributed.zero_stage={stage}", "train.learning_rate=1e-4", *sizes, *options)
    name = f"sixteen-{stage}"
    if "model.dtype=float16" in options and not has_kernels("float16"):
        runs.ranks.start(runs.arguments(name, *options), 1)
        assert runs.ranks.wait() == [2]
        [line] = runs.ranks.errors(0).splitlines()
        assert line.startswith("error: model.dtype: found 'float16', allowed: float32 or bfloat16 with")
        return
    whole = runs.train(name, 1, *options)
    for update in runs.updates(name):
        assert update["ratio_max_deviation"] == no_deviation()
    weights, first = saved(whole), saved(whole, name="iteration-000001")
    # the float32 originals, which keep what the type to compute in would round away
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())
    assert distance(weights, first) > 1e-6
    shutil.copytree(whole, runs.folder / f"{name}-parts")
    shutil.rmtree(runs.folder / f"{name}-parts" / "checkpoints" / "iteration-000002")
    parts = runs.train(f"{name}-parts", 1, *options, resume="auto")
    for group in ("policy", "optimizer"):
        found, expected = saved(parts, group), saved(whole, group)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    states = [
        json.loads((folder / "checkpoints" / "iteration-000002" / "state.json").read_text("utf-8"))["engine"]
        for folder in (whole, parts)
    ]
    assert states[0] == states[1]
    if "model.dtype=float16" in options:
        assert states[0]["scaler"]["scale"] >= 1.0


NOT_FINITE = """\
import loopfast.engines.zero as engines
backward, calls = engines.ZeroEngine.backward, []
def infinite(self, loss, **options):
    calls.append(1)
    return backward(self, loss * (float("nan") if len(calls) == 2 else 1.0), **options)
engines.ZeroEngine.backward = infinite
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_ends_the_run(stage: int, runs: Runs) -> None:
    arguments = runs.arguments(f"infinite-{stage}", f"distributed.zero_stage={stage}", "model.tune=lora")
    runs.ranks.start(arguments, 1, before=NOT_FINITE)
    assert runs.ranks.wait() == [1]
    [line] = runs.ranks.errors(0).splitlines()
    assert line.startswith("error: iteration ")
    assert "the gradient's norm is not finite; images and prompts are in" in line


@pytest.mark.parametrize(
    ("command", "content", "said"),
    [
        (
            "train --config",
            '{"zero_optimization": {"stagee": 3}}',
            "stagee: Extra inputs are not permitted, found 3",
        ),
        ("config check", '{"communication_data_type": "fp99"}', "Invalid communication_data_type. Supported"),
        ("config check", '{"timers": {"throughput": {"enabled": "x"}}}', 'found "x"'),
        ("config check", '{"compile": {"deepcompile": []}}', "found []"),
        ("config deepspeed", '{"nebula": {"enabled": true}}', "Nebula checkpointing has been removed"),
    ],
)
def test_settings_that_deepspeed_refuses_name_the_file(
    command: str, content: str, said: str, runs: Runs
) -> None:
    file = runs.folder / "mine.json"
    file.write_text(content)
    config = runs.arguments("refused", "distributed.zero_stage=2", f"distributed.deepspeed={file}")[-1]
    # before anything is loaded
    runs.ranks.start([*command.split(), config], 1)
    assert runs.ranks.wait() == [2]
    [line] = runs.ranks.errors(0).splitlines()
    assert line.startswith(f"error: distributed.deepspeed: DeepSpeed refuses {file}: ")
    assert said in line


def test_every_key_that_deepspeed_reads_is_known(runs: Runs) -> None:
    program = """
from deepspeed.runtime.config import DeepSpeedConfig
from loopfast.engines.deepspeed_file import KNOWN

read = set()

class Settings(dict):
    def get(self, key, default=None):
        read.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        read.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

DeepSpeedConfig(Settings(train_micro_batch_size_per_gpu=1))
assert len(read) > 50
print(*sorted(read - set(KNOWN)))
"""
    runs.ranks.fork(program)
    assert runs.ranks.wait() == [0], runs.ranks.errors(0)
    assert runs.ranks.shown(0).strip() == ""


def test_settings_of_ones_own_are_used(runs: Runs) -> None:
    file = runs.folder / "buckets.json"
    file.write_text(
        '{"zero_optimization": {"reduce_bucket_size": 12345, "stage": 2}, "bf16": {"enabled": "auto"}}'
    )
    program = (
        "import deepspeed\ninitialize = deepspeed.initialize\n"
        "def shown(**options):\n    print('bucket', options['config']['zero_optimization']['reduce_bucket_size'])\n"
        "    return initialize(**options)\n"
        "deepspeed.initialize = shown\n"
    )
    options = (
        "distributed.zero_stage=2",
        f"distributed.deepspeed={file}",
        "train.iterations=1",
        "model.tune=lora",
    )
    runs.ranks.run(runs.arguments("buckets", *options), 1, before=NO_REPORT + program)
    assert "bucket 12345" in runs.ranks.shown(0)
