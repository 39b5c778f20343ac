from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loopfast.config import Config, load_config, parse_config
from loopfast.errors import ConfigError
from loopfast.planning import Plan, as_dict, as_tables, counting, load_architecture, networks, plan
from loopfast.planning.devices import DEVICES, choose, parse_memory
from loopfast.planning.memory import Resources, with_sizes
from loopfast.planning.networks import form_of, training_call
from loopfast.planning.savings import Saving, advise, changed, fits
from loopfast.planning.speed import Work

GIB = 2**30


def config(*overrides: str) -> Config:
    return load_config("sd15-jpeg", overrides)


def small(*overrides: str) -> Config:
    return load_config("tiny", ["model.device=cpu", *overrides])


def text(found: Plan) -> str:
    console = Console(width=200, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(as_tables(found))
    return capture.get()


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("24g", 24 * GIB),
        ("1.5 TiB", 3 * 2**39),
        ("2000000", 2 * 10**6),
    ],
)
def test_sizes(written: str, size: int) -> None:
    assert parse_memory(written) == size


@pytest.mark.parametrize("written", ["", "lots", "-3GB", "24 Gb/s", "0", "12"])
def test_no_sizes(written: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory: found .*, allowed: a size such as 24GiB"):
        parse_memory(written)


def test_values_that_are_not_allowed() -> None:
    with pytest.raises(ConfigError, match="--gpus: found 0, allowed: a whole number >= 1"):
        plan(small(), gpus=0)
    with pytest.raises(ConfigError, match=r"--card: found 'rtx', allowed: rtx3060, .*, cpu"):
        plan(small(), card="rtx")


def test_the_card_is_named_or_the_smallest_with_the_memory() -> None:
    assert choose(config().model.device, "h100-80", None, 2)[1] == Resources("cuda", 80 * GIB, 2)
    assert choose(config().model.device, None, "24GiB", None)[0] is DEVICES["rtx3090"]
    assert choose(config().model.device, None, "30GiB", None)[0] is DEVICES["a100-40"]
    assert choose(config().model.device, "a100-80", "10GiB", None)[1].memory == 10 * GIB
    assert choose(small().model.device, None, None, None)[0].kind == "cpu"


def test_processes_on_a_cpu_share_its_memory() -> None:
    assert Resources("cpu", 8 * GIB, 4).usable == 2 * GIB
    assert Resources("cuda", 8 * GIB, 4).usable == 8 * GIB


@pytest.fixture(scope="module")
def sharded() -> Plan:
    return plan(
        config("model.tune=full", "rollout.microbatch=2", "train.microbatch=2"), gpus=4, card="rtx3090"
    )


def test_the_largest_sizes_fit_and_the_next_do_not(sharded: Plan) -> None:
    for stage in sharded.stages:
        number, batch = stage.footprint.stage, stage.footprint.batch

        def possible(stage: int = number, **sizes: Any) -> bool:
            changed = with_sizes(sharded.config, **sizes)
            return fits(changed, sharded.architecture, sharded.resources, stage)

        rows = (batch.rollout, batch.replay)
        if (most := stage.largest_samples) is not None:
            assert possible(samples=most, microbatch=rows)
            assert not possible(samples=most + 1, microbatch=rows)
        if (most := stage.largest_microbatch) is not None:
            assert possible(microbatch=(most, most))
            assert most == batch.images or not possible(microbatch=(most + 1, most + 1))


@pytest.mark.parametrize(
    ("overrides", "gpus", "card"),
    [
        (["rollout.microbatch=16", "train.microbatch=16"], 1, "rtx3060"),
        (["model.tune=full"], 1, "rtx3090"),
        (["model.tune=full"], 4, "rtx3090"),
        (["model.tune=full", "model.dtype=float32"], 2, "rtx3060"),
    ],
)
def test_the_savings_that_are_advised_suffice_and_are_needed(
    overrides: list[str], gpus: int, card: str
) -> None:
    there = config(*overrides)
    resources = choose(there.model.device, card, None, gpus)[1]
    architecture = load_architecture(there.model)
    assert not fits(there, architecture, resources)
    advice = advise(there, architecture, resources)
    assert advice.fits
    settings = dict(override.split("=") for override in advice.overrides)
    better = changed(there, settings)
    assert better is not None
    assert fits(better, architecture, resources)
    assert advice.savings[-1].total <= resources.memory
    totals = [applied.total for applied in advice.savings]
    assert totals == sorted(totals, reverse=True)
    for index in range(len(advice.savings)):
        rest = {
            k: v for i, a in enumerate(advice.savings) if i != index for k, v in a.saving.settings.items()
        }
        fewer = changed(there, rest)
        assert fewer is None or not fits(fewer, architecture, resources)


def test_an_adapter_is_the_last_resort() -> None:
    there = config("model.tune=full")
    advice = advise(there, load_architecture(there.model), Resources("cuda", 12 * GIB))
    names = [applied.saving.name for applied in advice.savings]
    assert names
    assert names.index("a low-rank adapter") == len(names) - 1 if "a low-rank adapter" in names else True


def test_what_fits_needs_no_savings() -> None:
    found = plan(small())
    assert found.chosen.fits
    assert found.advice.savings == ()
    assert "It fits as configured." in text(found)


def test_what_cannot_fit_is_said_to() -> None:
    found = plan(load_config("tiny"), memory="500MB")
    assert not found.advice.fits
    assert "it does not fit with all savings" in text(found)


def test_settings_that_contradict_the_rest_are_no_saving() -> None:
    saving = Saving("offload", {"distributed.offload": "all"}, "")
    assert changed(config(), saving.settings) is None


def test_scaling(sharded: Plan) -> None:
    assert [scale.gpus for scale in sharded.weak] == [1, 8, 64, 512]
    assert [scale.images for scale in sharded.weak] == [32, 256, 2048, 16384]
    assert {scale.images for scale in sharded.strong} == {128}
    # each does the same work, and sends nearly the same
    assert len({round(scale.compute_seconds, 3) for scale in sharded.weak[1:]}) == 1
    assert sharded.weak[0].communication_seconds == 0
    assert sharded.weak[1].communication_seconds < sharded.weak[2].communication_seconds
    computes = [scale.compute_seconds for scale in sharded.strong]
    assert computes == sorted(computes, reverse=True)
    count, updates = 859_520_964, 2
    assert sharded.weak[1].bytes_sent["reduce gradients"] == round(2 * 7 / 8 * 4 * count * updates)


def test_gathering_all_weights_is_counted_by_call() -> None:
    overrides = ("model.tune=full", "distributed.zero_stage=3")
    plain, checked = (
        plan(config(*overrides, f"train.gradient_checkpointing={value}"), gpus=8, card="h100-80")
        for value in ("false", "true")
    )
    name = "gather weights, replay"
    calls = 2 * plain.chosen.footprint.batch.calls
    assert plain.weak[1].bytes_sent[name] == round(2 * 7 / 8 * 2 * 859_520_964 * calls)
    assert checked.weak[1].bytes_sent[name] == round(1.5 * plain.weak[1].bytes_sent[name])
    # the copy to sample from is made once
    assert plain.weak[1].bytes_sent["gather weights, rollout"] == round(7 / 8 * 2 * 859_520_964)


def test_json_has_these_keys(sharded: Plan) -> None:
    found = json.loads(json.dumps(as_dict(sharded)))
    assert list(found) == [
        "model",
        "device",
        "zero_stage",
        "stages",
        "fits",
        "levers",
        "iteration",
        "scaling",
        "not_counted",
    ]
    assert list(found["stages"][3]) == [
        "stage",
        "total",
        "fits",
        "peak_phase",
        "held",
        "phases",
        "host",
        "batch",
        "largest_samples_per_prompt",
        "largest_microbatch",
    ]
    assert found["model"]["parameters"]["denoiser"] == 859_520_964
    assert found["iteration"]["seconds"]["total"] == pytest.approx(sum(sharded.seconds.values()))
    assert list(found["scaling"]["weak"][0]) == [
        "gpus",
        "images",
        "compute_seconds",
        "communication_seconds",
        "seconds",
        "efficiency",
        "bytes_sent",
    ]


def test_tables_say_what_is_an_estimate(sharded: Plan) -> None:
    shown = text(sharded)
    assert "859.5 M" in shown
    assert "estimated from datasheet rates" in shown
    assert "ZeRO 0 (configured)" in shown
    assert "Host memory of a node" in shown


def test_what_is_not_counted_is_said() -> None:
    mine = parse_config("{model: {pretrained: embedded, device: cpu}, reward: [{name: 'mine:reward'}]}")
    assert any("mine:reward" in line for line in as_dict(plan(mine))["not_counted"])


def test_a_large_models_operators_are_worked_out_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, worked_out = [], []
    flops = counting._flops

    class Counted(counting._Results):
        def of(self, *arguments: Any) -> Any:
            asked.append(arguments[0])
            return super().of(*arguments)

    def counted(*arguments: Any) -> int:
        worked_out.append(arguments[0])
        return flops(*arguments)

    monkeypatch.setattr(networks, "_trace", networks._trace.__wrapped__)
    monkeypatch.setattr(counting, "_results", Counted())
    monkeypatch.setattr(counting, "_flops", counted)
    architecture = load_architecture(config().model, "pixart-sigma")
    training_call(architecture, form_of(config(), "cuda", sharded=False), accumulating=True)
    assert len(asked) > 3000
    assert 0 < len(worked_out) < len(asked) / 20


def test_a_pipeline_that_cannot_be_trained_is_planned(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OtherPipeline"}))
    found = plan(small(f"model.pretrained={folder}"))
    assert not found.architecture.trainable
    assert "This release plans a OtherPipeline, but does not train it" in text(found)


def test_decoding_takes_the_time_of_its_precision() -> None:
    device, work = DEVICES["a100-80"], Work(rollout=0.0, decoding=1e15, replay=0.0, optimizer=0.0)

    def seconds(*overrides: str) -> float:
        return work.seconds(device, config(*overrides))["decoding"]

    ieee, half = "model.decoder_precision=float32", "model.decoder_precision=model"
    assert seconds() == seconds("model.tf32=true") < seconds(ieee) == seconds(half, "model.dtype=float32")
    assert seconds(half, "model.dtype=bfloat16") < seconds()
