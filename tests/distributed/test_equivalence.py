"""A run is the same on one process and on several, whatever they share."""

from __future__ import annotations

import pytest

from tests.distributed.conftest import Runs, distance, metrics, saved
from tests.rounding import no_deviation

LORA = ("model.tune=lora",)
KL = ("algorithm.kl_weight=0.1", "rollout.guidance_scale=2", "train.iterations=1")


@pytest.mark.parametrize(
    ("size", "alone", "options"),
    [
        (2, LORA, ("distributed.zero_stage=2", "distributed.offload=optimizer")),
        (2, LORA, ("distributed.zero_stage=3", "distributed.offload=all")),
        (2, (), ("distributed.zero_stage=2",)),
        # the reference is sharded, too, the sharded model samples, and an update takes several calls
        (
            2,
            KL,
            (
                "distributed.zero_stage=3",
                "rollout.replica=none",
                "train.gradient_checkpointing=true",
                "train.microbatch=3",
            ),
        ),
        (4, (), ("distributed.zero_stage=0",)),
    ],
)
def test_many_processes_train_the_same_run(
    size: int, alone: tuple[str, ...], options: tuple[str, ...], runs: Runs
) -> None:
    expected_name, name = runs.shared(1, *alone), runs.shared(size, *alone, *options)
    expected, folder = runs.folder / expected_name, runs.folder / name
    for found, wanted in zip(runs.updates(name), runs.updates(expected_name), strict=True):
        # a loss is a small difference of terms whose size is the advantages': their standard deviation, 1
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        assert found["clip_fraction"] == wanted["clip_fraction"]
        assert found["ratio_max_deviation"] == pytest.approx(
            wanted["ratio_max_deviation"], rel=1e-3, abs=1e-5
        )
    # before an iteration's first update the policy is the one that sampled
    for update in runs.updates(name)[::2]:
        assert update["ratio_max_deviation"] == no_deviation()
    assert max(abs(update["loss"]) for update in runs.updates(name)) > 1e-3
    assert distance(saved(folder), saved(expected)) < 1e-5
    assert distance(saved(folder, "optimizer"), saved(expected, "optimizer")) < 1e-3
    for found, wanted in zip(metrics(folder), metrics(expected), strict=True):
        assert found.keys() == wanted.keys()
        for key in found.keys() & {"reward_mean", "group_spread", "eval_reward", "images"}:
            assert found[key] == pytest.approx(wanted[key], abs=1e-5)
