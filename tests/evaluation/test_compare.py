from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loopfast.__main__ import main
from loopfast.config import Config, config_to_yaml
from loopfast.errors import ConfigError, LoopfastError
from loopfast.evaluation.compare import RewardSummary, as_markdown, compare_runs
from loopfast.reporting import Curve, reward_curves
from loopfast.run.console import Display
from loopfast.training.train import train

MakeConfig = Callable[..., Config]


def line(iteration: int, **values: float | None) -> dict[str, Any]:
    return {"iteration": iteration, "images": 8 * iteration, "seconds": 30.5 * iteration, **values}


def a_run(config: Config, lines: Sequence[dict[str, Any]]) -> Path:
    """A run's folder as training leaves it, without weights."""
    folder = Path(config.run.directory) / config.run.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return folder


def benchmark(folder: Path, name: str, categories: dict[str, dict[str, float]]) -> None:
    """Results as ``loopfast benchmark`` writes them."""
    models = {name: {} for name in next(iter(categories.values()))}
    intervals = {
        category: {
            "intervals": {
                model: {"mean": mean, "low": 0.0, "high": 1.0}
                for model, mean in {**scores, "difference": 0.0}.items()
            }
        }
        for category, scores in categories.items()
    }
    place = folder / "benchmarks" / name
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps({"models": models, "categories": intervals}))


REWARDS = "reward=[{name: jpeg_compressibility}, {name: embedded, weight: 0}]"


@pytest.fixture
def loop(small_config: MakeConfig) -> Path:
    lines = [
        line(0, eval_reward=-9.0, eval_jpeg_compressibility=-9.0, eval_embedded=0.1),
        line(1, reward_mean=-8.5),
        line(2, eval_reward=-4.0, eval_jpeg_compressibility=-4.0, eval_embedded=0.3),
        line(3, eval_reward=-5.0, eval_jpeg_compressibility=-5.0, eval_embedded=None),
    ]
    folder = a_run(small_config("run.name=loop", REWARDS), lines)
    benchmark(
        folder, "embedded", {"color": {"base": 0.25, "trained": 0.5}, "shape": {"base": 0.1, "trained": 0.2}}
    )
    return folder


@pytest.fixture
def ppo(small_config: MakeConfig) -> Path:
    config = small_config(
        "run.name=ppo", "algorithm.name=ppo", "algorithm.samples_per_prompt=4", "reward=[{name: embedded}]"
    )
    folder = a_run(config, [line(0, eval_reward=0.2, eval_embedded=0.2), line(2, reward_mean=0.25)])
    benchmark(folder, "embedded", {"color": {"trained": 0.75}})
    return folder


def test_what_runs_did_and_what_came_of_it(loop: Path, ppo: Path) -> None:
    (first, second), files = compare_runs([loop, ppo], None)
    assert files == []
    assert (first.label, first.algorithm, first.samples_per_prompt) == ("loop", "loop", 2)
    assert (first.iterations, first.planned, first.images, first.seconds) == (3, 3, 24, 91.5)
    assert first.rewards == {
        "reward": RewardSummary(-9.0, -5.0, -4.0, 2),
        "jpeg_compressibility": RewardSummary(-9.0, -5.0, -4.0, 2),
        "embedded": RewardSummary(0.1, 0.3, 0.3, 2),
    }
    assert first.benchmarks == {
        "embedded": {"color": {"base": 0.25, "trained": 0.5}, "shape": {"base": 0.1, "trained": 0.2}}
    }
    assert (second.label, second.algorithm, second.samples_per_prompt) == ("ppo", "ppo", 4)
    assert (second.iterations, second.planned) == (2, 3)
    assert second.rewards == {
        "reward": RewardSummary(0.2, 0.2, 0.2, 0),
        "embedded": RewardSummary(0.2, 0.2, 0.2, 0),
    }


def test_the_tables(loop: Path, ppo: Path) -> None:
    lines = as_markdown(compare_runs([loop, ppo], None)[0]).splitlines()
    for row in (
        "| run | algorithm | K | iterations | images | wall time |",
        "| loop | loop | 2 | 3 | 24 | 0:01:32 |",
        "| ppo | ppo | 4 | 2 of 3 | 16 | 0:01:01 |",
        "| first → last (best at) | reward | jpeg_compressibility | embedded |",
        "| loop | -9.000 → -5.000 (-4.000 at 2) | -9.000 → -5.000 (-4.000 at 2) | 0.100 → 0.300 (0.300 at 2) |",
        "| ppo | 0.200 → 0.200 (0.200 at 0) | - | 0.200 → 0.200 (0.200 at 0) |",
        "| embedded | color | shape |",
        "| loop, base | 0.2500 | 0.1000 |",
        "| loop, trained | 0.5000 | 0.2000 |",
        "| ppo, trained | 0.7500 | - |",
    ):
        assert row in lines


def test_the_command_writes_tables_and_plots(
    loop: Path, ppo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a" / "comparison"
    assert main(["compare", str(loop), str(ppo), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    names = ["comparison.json", "comparison.md", "reward.png", "reward-embedded.png"]
    assert [Path(text).name for text in shown.splitlines()[-4:]] == names
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    assert "loop, trained" in shown
    found = json.loads((output / "comparison.json").read_text("utf-8"))
    assert [summary["label"] for summary in found] == ["loop", "ppo"]
    assert found[0]["rewards"]["reward"] == {"first": -9.0, "last": -5.0, "best": -4.0, "best_iteration": 2}
    for name in names[2:]:
        with Image.open(output / name) as image:
            assert image.format == "PNG"
            assert image.width > 2 * image.height
    # nothing is written unless asked for
    assert main(["compare", str(loop)]) == 0
    assert "comparison.md" not in capsys.readouterr().out


def test_one_run_has_a_plot_of_every_reward(loop: Path, tmp_path: Path) -> None:
    _, files = compare_runs([loop], tmp_path / "out")
    assert [file.name for file in files[2:]] == [
        "reward.png",
        "reward-jpeg_compressibility.png",
        "reward-embedded.png",
    ]


def test_runs_of_one_name_are_told_apart(make_config: MakeConfig, tmp_path: Path) -> None:
    folders = [
        a_run(make_config(tmp_path / part, "run.name=same"), [line(0, eval_reward=0.5)])
        for part in ("x", "y")
    ]
    summaries, _ = compare_runs(folders, None)
    assert [summary.label for summary in summaries] == ["x/same", "y/same"]
    with pytest.raises(ConfigError, match="is given twice"):
        compare_runs([folders[0], tmp_path / "y" / ".." / "x" / "same"], None)


def test_a_run_that_has_just_begun(small_config: MakeConfig, tmp_path: Path) -> None:
    folder = a_run(small_config(REWARDS), [])
    [summary], files = compare_runs([folder], tmp_path / "out")
    assert (summary.iterations, summary.images, summary.seconds, summary.rewards) == (0, 0, 0.0, {})
    assert [file.name for file in files] == ["comparison.json", "comparison.md"]
    assert "| small | loop | 2 | 0 of 3 | 0 | 0:00:00 |" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_real_run(small_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("train.iterations=1", "rollout.steps=2", "evaluation.limit_prompts=1")
    folder = train(small_config(REWARDS, *short), display=Display(quiet=True))
    capsys.readouterr()
    assert main(["compare", str(folder), "-o", str(tmp_path / "out")]) == 0
    [summary] = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    assert (summary["iterations"], summary["images"]) == (1, 8)
    assert set(summary["rewards"]) == {"reward", "jpeg_compressibility", "embedded"}


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["NOWHERE"], 2, "is not a run's folder"),
        (["RUN", "--output", "RUN/config.yaml"], 1, "cannot write in "),
        (["BROKEN"], 1, "is damaged"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    reason: str,
    loop: Path,
    ppo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (ppo / "benchmarks" / "embedded" / "results.json").write_text('{"categories": 3}')
    places = {"NOWHERE": tmp_path / "nowhere", "RUN": loop, "BROKEN": ppo}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    assert main(["compare", *arguments]) == code
    [text] = capsys.readouterr().err.splitlines()
    assert text.startswith("error: ")
    assert reason in text


def test_a_damaged_record_is_named(loop: Path) -> None:
    (loop / "metrics.jsonl").write_text('{"iteration": 0}\nnot json\n{"iteration": 2}\n')
    with pytest.raises(LoopfastError, match=r"metrics\.jsonl is damaged: line 2"):
        compare_runs([loop], None)


def test_curves_of_many_runs_are_told_apart(tmp_path: Path) -> None:
    curves = [
        Curve(f"run {index}", {"n": [0, 1, 2]}, [index, index + 0.5, index + 1.0]) for index in range(9)
    ]
    one = reward_curves(curves[:1], {"n": "iterations"}, "reward", tmp_path / "one.png")
    many = reward_curves(curves, {"n": "iterations"}, "reward", tmp_path / "many.png")
    with Image.open(one) as few, Image.open(many) as all_of_them:
        # the legend below has more lines
        assert all_of_them.height > few.height
        assert len(all_of_them.convert("RGB").getcolors(1 << 24)) > len(few.convert("RGB").getcolors(1 << 24))
