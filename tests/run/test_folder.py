from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from loopfast.config import Config, load_config
from loopfast.errors import ConfigError, LoopfastError
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.run.images import save_image
from loopfast.run.tracking import METRICS
from loopfast.system.files import write_file, writing
from loopfast.system.memory import memory_used

MakeConfig = Callable[..., Config]
QUIET = Display(quiet=True)


def test_a_new_run_keeps_its_configuration(small_config: MakeConfig, tmp_path: Path) -> None:
    config = small_config("run.seed=5")
    folder = RunFolder(config)
    assert folder.path == tmp_path / "small"
    assert folder.open(None, QUIET) is None
    assert load_config(folder.path / "config.yaml") == config
    # nothing was trained yet, so it may be opened again, and with other settings
    RunFolder(small_config("run.seed=6")).open(None, QUIET)
    assert load_config(folder.path / "config.yaml").run.seed == 6


def test_home_is_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_config: MakeConfig
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder(small_config("run.directory=~/mine")).path == tmp_path / "mine" / "small"


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints/iteration-000000"])
def test_a_folder_with_a_run_is_not_overwritten(trace: str, small_config: MakeConfig) -> None:
    folder = RunFolder(small_config())
    (folder.path / trace).mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        folder.open(None, QUIET)
    assert "--resume auto" in str(caught.value)
    assert "--set run.name=" in str(caught.value)
    assert not (folder.path / "config.yaml").exists()


def test_a_folder_that_cannot_be_made_is_named(small_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("in the way")
    with pytest.raises(LoopfastError, match=f"cannot write in {tmp_path / 'small'}: ") as caught:
        RunFolder(small_config()).open(None, QUIET)
    assert caught.value.exit_code == 1


def save(config: Config) -> RunFolder:
    folder = RunFolder(config)
    folder.open(None, QUIET)
    folder.checkpoints.save(1, 0, {"policy": {"weight": torch.ones(2)}}, {}, None)
    return folder


@pytest.mark.parametrize(
    "override",
    [
        "run.trackers=[tensorboard]",
        "model.device=auto",
        "train.iterations=99",
        "train.on_policy_check=off",
        "evaluation.every=7",
        "checkpoint.every=7",
        "checkpoint.keep=1",
        "checkpoint.keep_best=false",
    ],
)
def test_what_does_not_change_the_past_may_change(override: str, small_config: MakeConfig) -> None:
    save(small_config())
    changed = small_config(override)
    checkpoint = RunFolder(changed).open("auto", QUIET)
    assert checkpoint is not None
    assert checkpoint.iteration == 1
    assert load_config(checkpoint.path.parent.parent / "config.yaml") == changed


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("run.seed=1", "run.seed (was 0, is 1)"),
        ("model.tune=lora", "model.tune (was full, is lora)"),
        ("model.lora.targets=[to_q]", "model.lora.targets (was None, is ['to_q'])"),
        ("reward.0.weight=2.0", "reward (was "),
        ("algorithm.advantage.clip=null", "algorithm.advantage.clip (was 5.0, is None)"),
        ("rollout.microbatch=4", "rollout.microbatch (was auto, is 4)"),
        ("evaluation.prompts=embedded:all", "evaluation.prompts (was None, is embedded:all)"),
    ],
)
def test_what_changes_the_past_is_named(override: str, change: str, small_config: MakeConfig) -> None:
    folder = save(small_config())
    with pytest.raises(ConfigError, match="with another configuration: ") as caught:
        RunFolder(small_config(override)).open("auto", QUIET)
    assert change in str(caught.value)
    assert str(caught.value).count("(was ") == 1
    assert load_config(folder.path / "config.yaml") == small_config()


def test_a_moved_run_goes_on(small_config: MakeConfig, tmp_path: Path) -> None:
    save(small_config()).path.parent.joinpath("small").rename(tmp_path / "renamed")
    checkpoint = RunFolder(small_config("run.name=renamed")).open("auto", QUIET)
    assert checkpoint is not None


def test_a_relative_path_is_found(small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(small_config())
    monkeypatch.chdir(folder.checkpoints.directory)
    checkpoint = RunFolder(small_config()).open("iteration-000001", QUIET)
    assert checkpoint is not None
    assert checkpoint.iteration == 1


def test_failures_are_kept(small_config: MakeConfig) -> None:
    folder = RunFolder(small_config())
    images = [torch.full((3, 4, 6), math.nan), torch.full((3, 4, 6), 0.5)]
    kept = folder.save_failure(12, images, ["a", "b"])
    assert kept == folder.path / "failures" / "iteration-000012"
    assert json.loads((kept / "prompts.json").read_text("utf-8")) == {"000.png": "a", "001.png": "b"}
    for name, level in (("000.png", 0), ("001.png", 128)):
        with Image.open(kept / name) as image:
            assert image.size == (6, 4)
            assert image.getextrema() == ((level, level),) * 3


def test_images_are_rounded_and_kept_in_range(tmp_path: Path) -> None:
    image = torch.tensor([-1.0, 0.0, 0.5, 0.999, 1.0, 2.0]).view(1, 1, 6).expand(3, 1, 6)
    save_image(image, tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as written:
        assert [written.getpixel((x, 0)) for x in range(6)] == [(v,) * 3 for v in (0, 0, 128, 255, 255, 255)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (SafetensorError("io"), "io")],
)
def test_what_cannot_be_written_is_said_in_a_line(error: Exception, reason: str, tmp_path: Path) -> None:
    with pytest.raises(LoopfastError) as caught, writing(tmp_path):
        raise error
    assert str(caught.value) == f"cannot write in {tmp_path}: {reason}"


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "folder" / "file"
    write_file(file, b"first")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        write_file(file, b"second")
    assert file.read_bytes() == b"first"


def test_peak_memory_of_the_process() -> None:
    before = memory_used(torch.device("cpu"))["peak_memory_bytes"]
    assert before > 1e8
    held = torch.ones(30_000_000)
    assert memory_used(torch.device("cpu"))["peak_memory_bytes"] >= before
    assert held.sum() == 30_000_000


def test_memory_of_a_gpu_is_also_what_tensors_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:1")
    known = {device: (70, 1000)}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {device: 300}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", {device: 500}.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", known.__getitem__)
    used = memory_used(device)
    assert used == {
        "peak_memory_bytes": 300,
        "peak_reserved_bytes": 500,
        "device_memory_bytes": 930,
    }
    assert all(METRICS[name].unit == "byte" for name in used)
