from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import study
from benchmarks.study import (
    HELDOUT,
    METHODS,
    SWEEP_SEED,
    VALIDATION,
    Job,
    Method,
    Result,
    best_rates,
    table,
)
from loopfast.errors import LoopfastError
from tests.distributed.ranks import run_forked

RESULT = Result("LOOP, K = 4", 1e-4, 0, HELDOUT, 512, 1.0, 0.3, 0.5, 0.2, 0.4, 0.6)


def test_every_method_has_a_learning_rate_of_its_own_or_of_one_that_has() -> None:
    own = {method.name for method in METHODS if method.rate_of is None}
    assert {method.rate_of for method in METHODS} <= own | {None}


def test_best_rate_is_that_of_the_highest_validation_reward() -> None:
    sweep = [
        replace(RESULT, learning_rate=1e-4, final=0.5),
        replace(RESULT, learning_rate=2e-4, final=0.6),
        replace(RESULT, method="PPO", learning_rate=1e-4, final=0.4),
        replace(RESULT, method="PPO", learning_rate=2e-4, final=0.3),
    ]
    assert best_rates(sweep) == {"LOOP, K = 4": 2e-4, "PPO": 1e-4}


def test_table_has_mean_and_spread_and_the_best_first() -> None:
    finals = [
        replace(RESULT, method="PPO", seed=0, final=0.40),
        replace(RESULT, method="PPO", seed=1, final=0.44),
        replace(RESULT, seed=0, final=0.50),
        replace(RESULT, seed=1, final=0.52),
    ]
    rows = table(finals).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| LOOP, K = 4", "| PPO", "| before training"]
    assert "| 0.510 ± 0.014 | 0.500, 0.520 |" in rows[0]
    assert "| 0.420 ± 0.028 | 0.400, 0.440 |" in rows[1]


def test_methods_train_on_equal_numbers_of_images() -> None:
    for method in METHODS:
        arguments = Job(method, 1e-4, 0, HELDOUT).arguments(Path("runs"), [])
        settings = dict(a.split("=", 1) for a in arguments if "=" in a)
        samples = int(settings["algorithm.samples_per_prompt"])
        assert samples == method.samples
        assert samples * int(settings["rollout.prompts_per_iteration"]) == 256


@pytest.fixture
def overrides(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run_forked))
    settings = {
        "model.pretrained": pipeline_folder,
        "model.device": "cpu",
        "rollout.prompts_per_iteration": 2,
        "rollout.steps": 2,
        "train.steps": "all",
        "train.iterations": 1,
        "train.updates_per_iteration": 1,
        "evaluation.limit_prompts": 2,
        "run.trackers": "[]",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def test_study_sweeps_trains_and_writes_what_came_out(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = (Method("LOOP, K = 2", "loop", 2), Method("LOOP, K = 4", "loop", 4, rate_of="LOOP, K = 2"))
    monkeypatch.setattr(study, "METHODS", methods)
    monkeypatch.setattr(study, "IMAGES_PER_EVALUATION", 40)
    text = study.study(
        tmp_path / "out", tmp_path / "runs", seeds=[0], rates=[1e-4], parallel=2, overrides=overrides
    )
    record = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert [(r["seed"], r["prompts"]) for r in record["sweep"]] == [(SWEEP_SEED, VALIDATION)]
    assert [(r["method"], r["seed"], r["prompts"], r["images"]) for r in record["final"]] == [
        (method.name, 0, HELDOUT, 8) for method in methods
    ]
    assert (tmp_path / "out" / "results.md").read_text("utf-8") == text
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_is_named(tmp_path: Path, overrides: list[str]) -> None:
    job = Job(METHODS[0], 1e-4, 0, HELDOUT)
    with pytest.raises(LoopfastError, match=rf"{job.name} failed with exit code 2: .*no such file"):
        study.run(replace(job, prompts="nowhere-heldout"), tmp_path, overrides)
