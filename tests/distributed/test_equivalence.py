"""A run is the same on one process and on several, whatever they share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.conftest import Runs, distance, metrics, saved

FULL, LORA = "model.tune=full", "model.tune=lora"
FEW = ("checkpoint.every=2",)
KL = ("algorithm.kl_weight=0.1", "rollout.guidance_scale=2")


@pytest.fixture(scope="module")
def alone(runs: Runs) -> dict[Any, str]:
    """The runs of one process, by what they train."""
    options = {FULL: (FULL,), LORA: (LORA,), KL: (FULL, *KL)}
    for number, overrides in enumerate(options.values()):
        runs.train(f"alone-{number}", 1, *overrides, *FEW)
    return {key: f"alone-{number}" for number, key in enumerate(options)}


@pytest.mark.parametrize(
    ("size", "stage", "tune", "options"),
    [
        (2, 0, FULL, ()),
        (2, 2, LORA, ("distributed.offload=optimizer",)),
        (2, 3, FULL, ("train.microbatch=3",)),
        (2, 3, LORA, ("distributed.offload=all",)),
        (4, 0, LORA, ()),
        (4, 2, FULL, ()),
        (4, 3, FULL, ()),
        # the reference is sharded, too, and the sharded model samples
        (2, 3, KL, (*KL, "rollout.replica=none", "train.gradient_checkpointing=true")),
    ],
)
def test_many_processes_train_the_same_run(
    size: int, stage: int, tune: Any, options: tuple[str, ...], runs: Runs, alone: dict[Any, str]
) -> None:
    name = f"{size}-{stage}-{len(list(runs.folder.glob('*.yaml')))}"
    trained = FULL if tune == KL else tune
    folder = runs.train(name, size, trained, f"distributed.zero_stage={stage}", *FEW, *options)
    expected = runs.folder / alone[tune]
    pairs = zip(runs.updates(name), runs.updates(alone[tune]), strict=True)
    for found, wanted in pairs:
        # a loss is a small difference of terms whose size is the advantages': their standard deviation, 1
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        assert found["clip_fraction"] == wanted["clip_fraction"]
        assert found["ratio_max_deviation"] == pytest.approx(
            wanted["ratio_max_deviation"], rel=1e-3, abs=1e-5
        )
    # before an iteration's first update the policy is the one that sampled
    assert {update["ratio_max_deviation"] for update in runs.updates(name)[::2]} == {0.0}
    assert max(abs(update["loss"]) for update in runs.updates(name)) > 1e-3
    assert distance(saved(folder), saved(expected)) < 1e-5
    assert distance(saved(folder, "optimizer"), saved(expected, "optimizer")) < 1e-3
    for found, wanted in zip(metrics(folder), metrics(expected), strict=True):
        assert found.keys() == wanted.keys()
        for key in found.keys() & {"reward_mean", "group_spread", "eval_reward", "images"}:
            assert found[key] == pytest.approx(wanted[key], abs=1e-4)
    assert (folder / "report.html").exists()


def test_only_the_first_process_speaks(runs: Runs) -> None:
    runs.train("speech", 2, LORA, "distributed.zero_stage=2", "train.iterations=1")
    assert "processes     2, ZeRO stage 2" in runs.ranks.shown(0)
    assert runs.ranks.shown(0).count("final reward") == 1
    assert runs.ranks.shown(1) == runs.ranks.errors(1) == runs.ranks.errors(0) == ""
