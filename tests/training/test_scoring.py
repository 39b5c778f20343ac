"""What a run does about scores that are none."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loopfast.training.train as training
from loopfast.algorithms import ALGORITHMS, PromptStatistics
from loopfast.config import AlgorithmConfig, Config
from loopfast.errors import ConfigError, Interrupted, RewardError
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.run.tracking import read_metrics
from loopfast.training.loss import compare
from tests.rewards.test_thread import in_a_thread  # noqa: F401
from tests.training.test_resume import Signals, outcome

MakeConfig = Callable[..., Config]

# The second image of a prompt with the word in it is the one that fails, wherever it is scored.
REWARD = """
import os
from collections import Counter

seen = Counter()

def reward(images, prompts, metadata, word="star", how="nan", calls=0):
    values = images.mean((1, 2, 3)).tolist()
    seen["calls"] += 1
    if seen["calls"] <= calls or os.path.exists("mended"):
        return values
    for index, prompt in enumerate(prompts):
        seen[prompt] += 1
        if word in prompt and (seen[prompt] == 2 or how == "always"):
            if how == "raises":
                raise ZeroDivisionError("no luck")
            if how == "length":
                return values[1:]
            values[index] = float("inf" if how == "inf" else "nan")
    return values
"""
PROMPTS = ["a red circle", "a green ring", "a blue square", "a white star"]
EASY = "a red cross\na green triangle\n"


class Spoken(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def config(small_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """``config(options of the reward, "key=value", ...)``: an iteration of four prompts, two images each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"guarded_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "easy.txt").write_text(EASY)

    def make(options: str, *overrides: str) -> Config:
        sys.modules.pop(name, None)
        return small_config(
            f"reward=[{{name: '{name}:reward', label: mine, options: {options}}}]",
            "prompts.source=prompts.txt",
            "evaluation.prompts=easy.txt",
            "evaluation.every=0",
            "rollout.microbatch=3",
            "rollout.steps=2",
            "train.microbatch=8",
            "train.iterations=1",
            "rollout.on_bad_reward=drop_group",
            *overrides,
        )

    return make


def run(config: Config, resume: str | None = None) -> tuple[Path, list[str]]:
    display = Spoken()
    return training.train(config, resume=resume, display=display), display.warnings


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").iterdir())[-1] / "policy.safetensors")


def left_out(folder: Path, warnings: list[str], prompt: str) -> dict[str, float]:
    """The metrics of an iteration that has left a prompt out, and has said so."""
    [warning] = warnings
    kept = folder / "bad-rewards" / "iteration-000001"
    assert warning.startswith(
        f"iteration 1: 1 of 4 prompt(s) are left out, '{prompt}': reward 'mine' is not finite"
    )
    assert warning.endswith(f"; images and prompts are in {kept}")
    # of the two images the one at fault
    assert list(json.loads((kept / "prompts.json").read_text("utf-8")).values()) == [prompt]
    assert (kept / "000.png").is_file()
    [before, after] = read_metrics(folder / "metrics.jsonl")
    assert after["dropped_groups"] == 1
    assert before["eval_dropped_images"] == after["eval_dropped_images"] == 0
    assert all(math.isfinite(value) for value in after.values())
    return after


@pytest.mark.usefixtures("in_a_thread")
@pytest.mark.parametrize("worker", ["thread", "process"])
def test_a_prompt_is_left_out_wherever_its_images_are_scored(worker: str, config: MakeConfig) -> None:
    left_out(*run(config("{}", f"rollout.reward_worker={worker}")), "a white star")


def test_the_others_are_trained_on_as_if_it_had_not_been_there(config: MakeConfig, tmp_path: Path) -> None:
    # the seed draws the ring last: of three prompts the same, with the same noise, without it
    settings = ("rollout.reward_worker=none", "train.microbatch=3")
    dropped, said = run(config("{word: ring}", *settings, "run.name=dropped"))
    found = left_out(dropped, said, "a green ring")
    (tmp_path / "mended").touch()
    fewer = "rollout.prompts_per_iteration=3"
    three, warnings = run(config("{}", *settings, fewer, "run.name=three"))
    assert warnings == []
    expected = read_metrics(three / "metrics.jsonl")[1]
    for name in ("reward_mean", "reward_std", "group_spread", "reward_mine", "loss", "grad_norm", "kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for name, value in weights(three).items():
        torch.testing.assert_close(weights(dropped)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_advantages_and_history_are_those_of_the_others(name: str) -> None:
    rewards = torch.tensor([[1.0, 3.0], [math.nan, math.nan], [2.0, 7.0]])
    kept, device = torch.tensor([0, 2]), torch.device("cpu")
    mask = torch.tensor([True, False, True])
    histories = PromptStatistics(min_count=1), PromptStatistics(min_count=1)
    whole = compare(AlgorithmConfig(name=name), rewards, mask, ["a", "b", "c"], histories[0], device)
    rest = compare(AlgorithmConfig(name=name), rewards[kept], mask[kept], ["a", "c"], histories[1], device)
    assert torch.equal(whole.values.view(3, 2)[kept], rest.values.view(2, 2))
    assert torch.equal(whole.scale, rest.scale)
    # a process without pairs of its own makes a call of any row, which counts for nothing: it must not be NaN
    assert whole.values[2:4].tolist() == whole.rewards[1].tolist() == [0.0, 0.0]
    assert histories[0].state_dict() == histories[1].state_dict()


def test_too_few_or_too_many_scores_drop_all_prompts_of_the_batch(config: MakeConfig) -> None:
    # each batch of three images has two prompts, and the last prompt has an image in each of two batches
    folder, [warning] = run(config("{word: blue, how: length}", "rollout.microbatch=3"))
    [_, line] = read_metrics(folder / "metrics.jsonl")
    assert line["dropped_groups"] == 2
    assert "reward 'mine' returned 2 number(s); allowed: a tensor, array or list of 3 number(s)" in warning
    kept = json.loads((folder / "bad-rewards" / "iteration-000001" / "prompts.json").read_text("utf-8"))
    assert list(kept.values()) == ["a white star", "a blue square", "a blue square"]


def test_a_reward_that_raises_ends_the_run(config: MakeConfig) -> None:
    with pytest.raises(RewardError, match="reward 'mine' raised ZeroDivisionError: no luck") as caught:
        run(config("{how: raises}"))
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, ZeroDivisionError):
        cause = cause.__cause__
    assert cause is not None
    assert str(caught.value).endswith("iteration-000000 is saved, --resume auto goes on from there")


@pytest.mark.parametrize(
    ("word", "overrides", "dropped", "left"),
    [
        ("", (), "4 of 4", "0 (image, step) pairs are left for 2 update(s)"),
        (
            " b",
            ("train.steps=0:1", "train.updates_per_iteration=8"),
            "1 of 4",
            "6 (image, step) pairs are left for 8 update(s)",
        ),
    ],
)
def test_too_few_prompts_left_end_the_run(
    word: str, overrides: tuple[str, ...], dropped: str, left: str, config: MakeConfig
) -> None:
    with pytest.raises(RewardError) as caught:
        run(config(f"{{how: always, word: '{word}', calls: 1}}", *overrides))
    message = str(caught.value)
    assert message.startswith(f"iteration 1: {dropped} prompt(s) are left out, ")
    assert left in message
    assert message.endswith("iteration-000000 is saved, --resume auto goes on from there")


def test_an_error_loses_no_iteration(config: MakeConfig, tmp_path: Path) -> None:
    options = "{how: raises, word: '', calls: 4}"  # one of the evaluation, three an iteration
    settings = ("train.iterations=2", "checkpoint.every=50", "rollout.on_bad_reward=error")
    (tmp_path / "mended").touch()
    unbroken, _ = run(config(options, *settings, "run.name=unbroken"))
    (tmp_path / "mended").unlink()
    with pytest.raises(RewardError) as caught:
        run(config(options, *settings))
    folder = tmp_path / "small"
    saved = folder / "checkpoints" / "iteration-000001"
    assert str(caught.value).startswith("iteration 2: reward 'mine' ")
    assert str(caught.value).endswith(
        f"images and prompts are in {folder / 'failures' / 'iteration-000002'}; {saved} is saved, "
        "--resume auto goes on from there"
    )
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1]
    (tmp_path / "mended").touch()
    run(config(options, *settings), resume="auto")
    assert outcome(folder) == outcome(unbroken)


def test_an_error_in_an_evaluation_loses_no_iteration(config: MakeConfig, tmp_path: Path) -> None:
    options = "{word: triangle, how: always, calls: 4}"
    settings = ("rollout.on_bad_reward=error", "checkpoint.every=50")
    with pytest.raises(RewardError, match="iteration-000001 is saved"):
        run(config(options, *settings))
    (tmp_path / "mended").touch()
    folder, _ = run(config(options, *settings), resume="auto")
    lines = read_metrics(folder / "metrics.jsonl")
    assert [(line["iteration"], line["images"], "eval_mine" in line) for line in lines] == [
        (0, 0, True),
        (1, 8, True),
    ]


def test_a_run_goes_on_between_updates_of_an_iteration_with_a_prompt_left_out(config: MakeConfig) -> None:
    settings = ("algorithm.name=ppo", "train.iterations=2")
    unbroken, [_] = run(config("{}", *settings, "run.name=unbroken"))
    stopped = config("{}", *settings)
    with pytest.raises(Interrupted, match="iteration-000000-update-1"):
        training.train(stopped, display=Signals(signal.SIGTERM, "replay", 1))
    folder, warnings = run(stopped, resume="auto")
    assert warnings == []
    assert outcome(folder) == outcome(unbroken)
    state = json.loads((folder / "checkpoints" / "iteration-000001" / "state.json").read_text("utf-8"))
    history: dict[str, Any] = state["prompt_statistics"]
    assert set(history) == set(PROMPTS) - {"a white star"}
    assert all(math.isfinite(value) for seen in history.values() for value in seen)


def test_an_evaluation_leaves_images_out(config: MakeConfig) -> None:
    options = "{word: cross, how: inf}"
    folder, warnings = run(config(options, "evaluation.images_per_prompt=2", "evaluation.preview_images=2"))
    [warning] = warnings
    kept = folder / "bad-rewards" / "evaluation" / "iteration-000000"
    assert warning.startswith(
        "iteration 0: 1 of 4 image(s) are left out of the evaluation: reward 'mine' is not"
    )
    assert warning.endswith(f"images and prompts are in {kept}")
    assert [line["eval_dropped_images"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 0]
    record = json.loads((folder / "evaluation" / "iteration-000000.json").read_text("utf-8"))
    assert [item["prompt"] for item in record["items"]] == ["a red cross", *["a green triangle"] * 2]
    assert record["preview"]["items"] == [0, 1]
    assert record["reward"] == pytest.approx(sum(item["reward"] for item in record["items"]) / 3)


def test_an_evaluation_without_a_score_ends_the_run(config: MakeConfig) -> None:
    with pytest.raises(
        RewardError, match=r"iteration 0: 2 of 2 image\(s\) are left out of the evaluation: reward"
    ):
        run(config("{word: '', how: always}"))


def test_what_a_run_that_stopped_may_change(small_config: MakeConfig) -> None:
    def described(url: str, *options: str, weight: float = 1.0) -> Config:
        reward = f"[{{name: http, weight: {weight}, options: {{url: '{url}'}}}}, {{name: embedded}}]"
        return small_config(f"reward={reward}", *options)

    first = RunFolder(described("http://one"))
    first.open(None, Display(quiet=True))
    first.checkpoints.save(1, 0, {"policy": {"x": torch.zeros(1)}}, {}, None)
    moved = described("http://other", "rollout.on_bad_reward=drop_group")
    assert RunFolder(moved).open("auto", Display(quiet=True)) is not None
    with pytest.raises(ConfigError, match=r"with another configuration: reward \(was"):
        RunFolder(described("http://other", weight=2.0)).open("auto", Display(quiet=True))
