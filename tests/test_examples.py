"""Every script of examples/ runs, as a user would run it, and does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def shown(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.chdir(folder)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        "own_pipeline",
        "own_reward",
        "plain_torch",
    }


def test_a_reward_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("own_reward", tmp_path, monkeypatch, capsys)
    before, after = map(float, re.findall(r"(-?\d\.\d+) (?:before|after)", text))
    assert after > before + 0.02
    assert text.count("the reddest image") >= 1
    assert (tmp_path / "own-reward.png").is_file()
    assert (tmp_path / "runs" / "own-reward" / "report.html").is_file()


def test_a_pipeline_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("own_pipeline", tmp_path, monkeypatch, capsys)
    assert "the LoRA is in runs/own-pipeline/lora, its base in runs/own-pipeline/base" in text
    assert (tmp_path / "own-pipeline.png").is_file()


def test_the_ops_in_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("plain_torch", tmp_path, monkeypatch, capsys)
    rewards = [float(value) for value in re.findall(r"reward (-?\d\.\d+)", text)]
    assert rewards[-1] > rewards[0] + 0.1
