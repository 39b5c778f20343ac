"""What the race computes: that both do equal work, what is chosen of a sweep, and what is written down."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine.cases import LEVERS
from benchmarks.engine.cases import WORK as ENGINE_WORK
from benchmarks.engine.plain_worker import Plain
from benchmarks.race import __main__ as command
from benchmarks.race import chart, jobs, results
from benchmarks.race.figures import mean_curve, peak, summarize, time_to, time_to_reward
from benchmarks.race.reward import Field, loopfast_settings, sweep, trl_settings
from benchmarks.race.settings import (
    LOOPFAST_SWEEP,
    TRL_SWEEP,
    WORKS,
    best,
    iterations_for,
    loopfast_config,
    loopfast_pairs,
    loopfast_rows,
    loopfast_updates,
    merged,
    trl_config,
    trl_pairs,
    trl_rows,
    trl_updates,
)
from loopfast.config import load_config, parse_config
from loopfast.policies import load_schedule
from loopfast_kernels import transition_logprob

Json = dict[str, Any]


def whole(config: Json) -> Json:
    return parse_config(json.dumps(config)).model_dump(mode="json")


def ours(work: str, microbatches: tuple[int, int], **options: Any) -> Json:
    return loopfast_config(WORKS[work], microbatches, model="embedded", prompts="embedded:color", **options)


@pytest.mark.parametrize("name", WORKS)
def test_an_iteration_is_the_same_work_for_both(name: str) -> None:
    work = WORKS[name]
    for microbatches in work.microbatches:
        config = whole(ours(name, microbatches))
        for batches in work.trl_batches:
            trl = trl_config(work, batches)
            assert trl_updates(trl) == loopfast_updates(config) == work.updates
            assert trl_pairs(trl) == loopfast_pairs(config, work.steps)
            assert trl_rows(trl) == loopfast_rows(config, work.steps)
            assert trl["sample_guidance_scale"] == config["rollout"]["guidance_scale"] > 1
            assert trl["sample_num_steps"] == config["rollout"]["steps"]
            assert trl["sample_eta"] == config["rollout"]["eta"]
        train = config["train"]
        assert trl["train_learning_rate"] == train["learning_rate"]
        assert trl["train_max_grad_norm"] == train["max_grad_norm"]
        assert trl["train_clip_range"] == config["algorithm"]["clip_range"]
        assert [trl[f"train_adam_{key}"] for key in ("beta1", "beta2", "weight_decay")] == [
            train[key] for key in ("beta1", "beta2", "weight_decay")
        ]


def test_ratios_are_measured_over_all_pairs_of_one_update() -> None:
    work = WORKS["embedded"]
    trl = trl_config(work, (64, 16), updates=1)
    config = whole(ours("embedded", (32, 32), updates=1))
    assert trl_updates(trl) == loopfast_updates(config) == 1
    assert trl_pairs(trl) == loopfast_pairs(config, work.steps) == work.images * work.steps


@pytest.mark.parametrize(
    ("batches", "reason"), [((48, 16), "128 images"), ((64, 24), "multiple"), ((128, 64), "32 images")]
)
def test_batches_that_would_change_the_work_are_refused(batches: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        trl_config(WORKS["embedded"], batches)


def test_half_the_steps_are_five_rows_in_eight() -> None:
    default, half = (trl_rows(trl_settings(n, (128, 32), 0)) for n in ("lr 1e-4", "lr 1e-4, half the steps"))
    assert default == 2 * 128 * (10 + 3 * 10)
    assert half == 2 * 128 * (10 + 3 * 5)
    assert iterations_for(25 * default, half) == 40
    assert iterations_for(1.0, default) == 1


@pytest.mark.parametrize("name", LOOPFAST_SWEEP)
def test_our_settings_are_configurations(name: str) -> None:
    recipe = load_config("tiny").model_dump(mode="json")
    config = whole(loopfast_settings(name, recipe, seed=2))
    assert config["run"]["seed"] == 2
    without_guidance = "without guidance" in name
    assert config["rollout"]["guidance_scale"] == (1.0 if without_guidance else 3.0)
    with_guidance = merged(config, {"rollout": {"guidance_scale": 3.0}})
    assert loopfast_rows(with_guidance, 4) == loopfast_rows(config, 4) * (2 if without_guidance else 1)


def test_the_sweeps_leave_trl_its_defaults_but_for_what_they_name() -> None:
    base = trl_settings("lr 1e-4", (128, 32), 1)
    for name, changes in TRL_SWEEP.items():
        settings = trl_settings(name, (128, 32), 1)
        assert {key for key in settings if settings[key] != base.get(key)} <= set(changes)
        assert settings["seed"] == 1


@pytest.mark.parametrize("name", LEVERS)
def test_levers_are_configurations(name: str) -> None:
    base = loopfast_config(ENGINE_WORK, (16, 16), model="embedded", prompts="embedded:color")
    assert whole(merged(base, LEVERS[name].config)) != whole(base)
    assert bool(LEVERS[name].reason) == (LEVERS[name].device == "cuda")


def test_merged_replaces_the_innermost_values_only() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert merged(base, {"a": {"b": 3}, "d": [2]}) == {"a": {"b": 3, "c": 2}, "d": [2]}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


def test_best_ignores_what_was_not_measured() -> None:
    entries = [{"x": 2, "n": 0}, {"n": 1}, {"x": None, "n": 2}, {"x": 1, "n": 3}, {"x": 1, "n": 4}]
    assert best(entries, "x", largest=True)["n"] == 0
    assert best(entries, "x", largest=False)["n"] == 3
    with pytest.raises(ValueError, match="speed"):
        best(entries, "speed", largest=True)


def run_of(*seconds: float, peak_bytes: int = 100) -> Json:
    iterations = [{"seconds": s, "sampling": s / 4, "reward": 0.0, "training": s / 2} for s in seconds]
    fixed = {"peak_bytes": peak_bytes, "imported_bytes": 10, "optimizer_steps": 4, "trainable": 7}
    return {"iterations": iterations, **fixed}


def test_summary_is_the_median_of_medians_without_the_first_iterations() -> None:
    figures = summarize([run_of(99, 4, 5, 6), run_of(99, 1, 1, 50, peak_bytes=300), run_of(99, 8, 8, 8)], 10)
    assert figures["seconds"] == 5
    assert figures["seconds_of_runs"] == [5, 1, 8]
    assert (figures["sampling"], figures["training"]) == (1.25, 2.5)
    assert figures["images_per_s"] == 2
    assert figures["peak_bytes"] == 300


def test_a_reward_is_reached_where_it_is_confirmed() -> None:
    curve = [(10, 0.5), (20, 0.7), (30, 0.6), (40, 0.7), (50, 0.8)]
    assert time_to(curve, 0.7) == 40
    assert time_to(curve, 0.5) == 10
    assert time_to(curve, 0.75) == 50  # the last has no next
    assert time_to(curve, 0.9) is None
    assert peak([(10, 0.5), (20, 0.7), (30, 0.7)]) == (20, 0.7)


def test_curves_of_seeds_are_averaged_as_far_as_all_go() -> None:
    assert mean_curve([[(1, 0.0), (3, 1.0)], [(3, 0.5), (5, 0.0), (7, 9.0)]]) == [(2, 0.25), (4, 0.5)]


def test_time_to_reward() -> None:
    trl = [[(300, 0.4), (600, 0.6)], [(300, 0.5), (600, 0.8)]]
    fast = [[(50, 0.5), (100, 0.7), (150, 0.9)], [(50, 0.8), (100, 0.7), (150, 0.6)]]
    figures = time_to_reward(trl, fast)
    assert figures["target"] == pytest.approx(0.7)
    assert (figures["trl_seconds"], figures["loopfast_seconds"]) == (600, 100)
    assert figures["speedup"] == 6
    assert figures["trl_seeds"] == [0.6, 0.8]
    assert figures["loopfast_seeds"] == [100, 50]
    slow = time_to_reward(trl, [[(50, 0.1)], [(50, 0.1)]])
    assert slow["loopfast_seconds"] is None
    assert slow["speedup"] is None


class RecordedField(Field):
    """Runs that were never made: a setting's reward is the position of its name in the sweep."""

    def __init__(self) -> None:
        super().__init__("none", ["a"], load_config("tiny").model_dump(mode="json"), 4, (128, 32), 1, False)
        self.trained: dict[str, int] = {}

    def train(
        self, trainer: str, name: str, seed: int, *, iterations: int, every: int, **options: Any
    ) -> list[Json]:
        self.trained[f"{trainer}-{name}"] = iterations
        return [{"iteration": i, "file": str(i)} for i in range(every, iterations + 1, every)]

    def evaluate(self, name: str, files: Any, prompts: str, images: int, guidance: float) -> Any:
        assert prompts == "embedded:color-validation"
        return [{"reward": list(self.trained).index(name) / 10} for _ in files]


def test_the_sweep_gives_every_setting_the_same_rows_and_chooses_by_reward() -> None:
    field = RecordedField()
    found = sweep(field, 24, ("trl", "loopfast"), lambda line: None)
    assert set(found) == {"trl", "loopfast"}
    for trainer, names in (("trl", TRL_SWEEP), ("loopfast", LOOPFAST_SWEEP)):
        assert [entry["name"] for entry in found[trainer]["settings"]] == list(names)
        assert found[trainer]["chosen"] == list(names)[-1]
        for name in names:
            spent = field.trained[f"{trainer}-{name}"] * field.rows(trainer, name)
            assert abs(spent - found[trainer]["rows"]) <= field.rows(trainer, name) / 2
    assert field.trained["trl-lr 1e-4"] == 24


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Results of everything."""
    path = results.path_for("AMD EPYC, 2 cores", tmp_path)
    figures = summarize([run_of(9, 8, 8)], 128)
    entry = {
        "work": {"images": 128, "steps": 10},
        "trl": figures,
        "loopfast": {**figures, "seconds": 4.0, "images_per_s": 32.0},
        "speedup": 2.0,
        "ratios": {"bfloat16": {"trl": 0.8812, "loopfast": 0.0}},
        "date": "2026-01-01",
    }
    curves = {"trl": [[(300, 0.4), (600, 0.6)]], "loopfast": [[(50, 0.5), (100, 0.7)]]}
    raced = {**time_to_reward(curves["trl"], curves["loopfast"]), "curves": curves}
    settings = [{"name": n, "iterations": 25, "reward": r} for n, r in (("slow", 0.41), ("quick", 0.52))]
    versions = {"trl": {"trl": "0.23.1", "torch": "2"}, "loopfast": {"loopfast": "0.1", "torch": "2"}}
    machine = {"device": "AMD EPYC, 2 cores", "threads": 2}
    results.update(path, {"machine": {**machine, "versions": versions}, "equal_work": {"embedded": entry}})
    results.update(path, {"machine": machine, "sweep": {"trl": {"settings": settings, "chosen": "quick"}}})
    results.update(path, {"time_to_reward": {"primary": "3", "figures": {"3": raced}}})
    return path


def test_parts_written_one_after_the_other_are_all_there(file: Path) -> None:
    assert file.name == "race-amd-epyc-2-cores.json"
    found = results.load(file)
    assert found["machine"]["versions"]["trl"]["trl"] == "0.23.1"
    assert set(found) == {"machine", "equal_work", "sweep", "time_to_reward"}
    results.update(file, {"equal_work": {"sd-full": {"speedup": 1.23456789}}})
    found = results.load(file)
    assert set(found["equal_work"]) == {"embedded", "sd-full"}
    assert found["equal_work"]["sd-full"]["speedup"] == 1.2346


def test_the_tables_say_what_was_measured(file: Path) -> None:
    lines = results.report(results.load(file)).splitlines()

    def line(*cells: str) -> str:
        (found,) = (line for line in lines if all(f" {cell} " in line for cell in cells))
        return found

    assert "8.00 s" in line("embedded", "TRL", "16")
    assert "2.00×" in line("embedded", "loopfast", "4.00 s")
    assert "88 %" in line("embedded", "bfloat16")
    assert "0.520" in line("quick (chosen)")
    assert "6.0×" in line("0.600", "600 s", "100 s")
    assert results.report({}) == ""


def test_the_chart_is_drawn_from_what_there_is(file: Path, tmp_path: Path) -> None:
    found = results.load(file)
    chart.draw(found, tmp_path / "all.png")
    wide = (tmp_path / "all.png").stat().st_size
    del found["time_to_reward"]
    chart.draw(found, tmp_path / "work.png")
    narrow = (tmp_path / "work.png").read_bytes()
    assert narrow.startswith(b"\x89PNG")
    assert len(narrow) < wide
    assert chart.draw({"machine": {}}, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_show_prints_and_draws(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "device_name", lambda where: "AMD EPYC, 2 cores")
    assert command.main(["show", "--folder", str(file.parent)]) == 0
    shown = capsys.readouterr().out
    assert "Time to reward" in shown
    assert str(file) in shown
    assert file.with_suffix(".png").exists()


def test_a_race_without_trl_or_a_setting_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TRL_PYTHON", "LOOPFAST_PYTHON"):
        monkeypatch.setattr(command, name, tmp_path / "python")
    assert command.main(["equal", "--folder", str(tmp_path)]) == 1
    assert "make race" in capsys.readouterr().err
    (tmp_path / "python").touch()
    assert command.main(["reward", "--folder", str(tmp_path)]) == 1
    assert "--trl-setting" in capsys.readouterr().err


def test_a_worker_gets_its_threads_and_its_result_is_taken_once(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, sys\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "pathlib.Path('calls').open('a').write('.')\n"
        "answer = {key: os.environ.get(key) for key in ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE')}\n"
        "pathlib.Path(job['result']).write_text(json.dumps(answer))\n"
    )
    folder = tmp_path / "run"
    answer = jobs.run_worker(worker, {"a": 1}, folder, 3)
    assert answer == {"OMP_NUM_THREADS": "3", "HF_HUB_OFFLINE": "1"}
    for job, calls in (({"a": 1}, "."), ({"a": 2}, "..")):
        assert jobs.run_worker(worker, job, folder, 3, reuse=True) == answer
        assert (folder / "calls").read_text() == calls
    worker.write_text("raise SystemExit('no such model')\n")
    with pytest.raises(jobs.RaceError, match="no such model"):
        jobs.run_worker(worker, {"a": 3}, folder, 3)


def test_jobs_are_plain_data(tmp_path: Path) -> None:
    work = replace(WORKS["embedded"], images=8)
    job = jobs.trl_job(
        work, trl_config(work, (8, 2)), ["a"], iterations=2, repeat=4, export=tmp_path, keep_images=tmp_path
    )
    assert json.loads(json.dumps(job)) == job
    job = jobs.loopfast_job(ours("embedded", (16, 16)), tmp_path / "run", iterations=3)
    config = whole(job["config"])
    assert config["run"]["directory"] == str(tmp_path)
    assert config["checkpoint"]["every"] == config["train"]["iterations"] == 3
    judged = jobs.evaluation_job(["w"], [3.0], "embedded:color-heldout", images_per_prompt=4)
    assert whole(judged["config"])["rollout"]["eta"] == 1.0


@pytest.mark.skipif(not jobs.TRL_PYTHON.exists(), reason="TRL's environment is not there")
def test_trl_takes_our_arguments() -> None:
    code = "import json, sys; from trl import DDPOConfig; print(DDPOConfig(**json.loads(sys.argv[1])).seed)"
    for name in TRL_SWEEP:
        known = set(trl_settings(name, (128, 32), 7))
        assert known >= set(TRL_SWEEP[name])
    settings = {key: value for name in TRL_SWEEP for key, value in trl_settings(name, (128, 32), 7).items()}
    done = subprocess.run(
        [jobs.TRL_PYTHON, "-c", code, json.dumps(settings)],
        capture_output=True,
        text=True,
        env=jobs.environment(1),
        check=True,
    )
    assert done.stdout.strip() == "7"


def test_the_plain_loop_computes_what_we_do(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle and a blue square\n", "utf-8")
    work = replace(ENGINE_WORK, images=4, steps=4, updates=1)
    data = loopfast_config(work, (4, 4), model=str(jobs.EMBEDDED), prompts=str(prompts))
    config = parse_config(json.dumps(data))
    loop = Plain(config, ["a red circle and a blue square"])
    text, empty = loop.encode(loop.prompts), loop.encode([""])
    torch.manual_seed(0)
    latents, logprobs = loop.sample(text, empty)
    table = load_schedule(config.model, config.rollout).table
    for index, timestep in enumerate(loop.scheduler.timesteps):
        output = loop.predict(latents[index], timestep, text, empty)
        _, replayed = loop.transition(output, timestep, latents[index], None, latents[index + 1])
        expected = transition_logprob(
            output, latents[index], latents[index + 1], table, torch.full((4,), index), reduction="mean"
        )
        torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logprobs[index], expected, rtol=1e-4, atol=1e-4)
    before = [parameter.detach().clone() for parameter in loop.parameters]
    assert set(loop.iteration(["a red circle and a blue square"])) == {
        "seconds",
        "sampling",
        "reward",
        "training",
    }
    assert any(not torch.equal(old, new) for old, new in zip(before, loop.parameters, strict=True))


def test_our_batch_sizes_stay_within_the_memory_of_theirs() -> None:
    from benchmarks.race.equal import _within

    entries = [
        {"microbatches": [128, 128], "seconds": 1.0, "peak_bytes": 900},
        {"microbatches": [128, 64], "seconds": 2.0, "peak_bytes": 700},
        {"microbatches": [64, 64], "seconds": 3.0, "peak_bytes": 600},
    ]
    for memory, chosen in ((1000, 128), (700, 64), (500, 128)):
        assert _within(entries, {"peak_bytes": memory})["microbatches"][1] == chosen
