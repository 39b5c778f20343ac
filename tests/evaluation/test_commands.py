from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loopfast.__main__ import main
from loopfast.config import Config
from loopfast.run.console import Display
from loopfast.training.train import train
from tests.families import save_tiny

MakeConfig = Callable[..., Config]
SHORT = ("rollout.prompts_per_iteration=2", "rollout.steps=2", "evaluation.every=0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    config = make_config(tmp_path_factory.mktemp("runs"), *SHORT, "train.iterations=2")
    return train(config, display=Display(quiet=True))


# The model reads 16 tokens, two of them marks of beginning and end.
LONG = "a blue cross and " * 4 + "a red circle"
LONG_IS_CUT = (
    "1 of 1 is longer than a text encoder reads and cut (CLIP at 16 tokens: 1), the first after "
    "'… blue cross and a blue'"
)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_eval_repeats_the_runs_own_last_evaluation(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tf32: Callable[[bool], None]
) -> None:
    output = tmp_path / "new" / "scores.json"
    tf32(True)
    assert main(["eval", str(finished), "--output", str(output)]) == 0
    # as in the run, whatever the model's device
    assert not torch.backends.cudnn.allow_tf32
    shown = capsys.readouterr()
    result = json.loads(output.read_text("utf-8"))
    last = json.loads((finished / "evaluation" / "iteration-000002.json").read_text("utf-8"))
    assert {name: last[name] for name in result} == result
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines()]
    assert ["all", *(f"{value:.3f}" for value in (result["reward"], *result["parts"].values())), "4"] in rows
    assert f"scores of 4 images written to {output}" in shown.out
    assert shown.err == ""


def test_eval_of_other_prompts_and_noise(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(f"a red circle\n{LONG}\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--images-per-prompt", "3", "-q"]
    found = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        output = tmp_path / f"{name}.json"
        assert main(["eval", str(finished), *options, "--seed", seed, "--output", str(output)]) == 0
        found.append(json.loads(output.read_text("utf-8")))
    assert [item["prompt"] for item in found[0]["items"]] == ["a red circle"] * 3 + [LONG] * 3
    assert set(found[0]["by_category"]) == {"all"}
    assert found[0] == found[1]
    assert found[0]["reward"] != found[2]["reward"]
    assert capsys.readouterr().err == f"warning: prompts: {LONG_IS_CUT.replace('1 of 1', '1 of 2')}\n" * 3


def test_sample_of_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a red circle and a blue square!", "a green cross"]
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, ("0", "0", "1"), strict=True):
        options = ["--count", "2", "--seed", seed, "--output", str(folder)]
        assert main(["sample", str(finished), *texts, *options]) == 0
    assert capsys.readouterr().out.endswith(f"5 file(s) in {folders[2]}\n")
    first, again, other = (files(folder) for folder in folders)
    with Image.open(folders[0] / "grid.png") as grid:
        # two images beside each other; two prompts, each by the base model and the trained one
        assert grid.height > 1.9 * grid.width
    assert first.pop("grid.png") == again.pop("grid.png") != other.pop("grid.png")
    assert list(first) == [
        "000-a-red-circle-and-a-blue-square-00.png",
        "000-a-red-circle-and-a-blue-square-01.png",
        "001-a-green-cross-00.png",
        "001-a-green-cross-01.png",
    ]
    assert first == again
    assert all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == 4
    with Image.open(folders[0] / next(iter(first))) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


def test_sample_of_more_images_keeps_the_first_ones(finished: Path, tmp_path: Path) -> None:
    for count in ("1", "3"):
        options = ["--count", count, "--output", str(tmp_path / count), "-q", "--no-base"]
        assert main(["sample", str(finished), "--prompt", "a red circle", *options]) == 0
    one, three = files(tmp_path / "1"), files(tmp_path / "3")
    assert len(three) == 3
    assert one.keys() <= three.keys()
    for name in one:
        first, again = (np.asarray(Image.open(tmp_path / count / name), np.int16) for count in ("1", "3"))
        # in calls of other sizes some processors round images differently: a pixel may fall on the other side of a half
        assert np.abs(first - again).max() <= 1


def test_sample_options_change_the_images(finished: Path, tmp_path: Path) -> None:
    found = []
    for number, options in enumerate(([], ["--steps", "3"], ["--eta", "0"], ["--guidance-scale", "3"])):
        output = tmp_path / str(number)
        arguments = ["sample", str(finished), "a red circle", "--count", "1", *options]
        assert main([*arguments, "--output", str(output), "-q", "--no-base"]) == 0
        found += files(output).values()
    assert len(set(found)) == 4


def test_sample_of_a_pipeline(
    pipeline_folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{LONG}\n")
    options = ["--prompts", str(prompts), "--count", "1", "--steps", "2", "-q"]
    exported = finished / "model"
    for target, folder in ((pipeline_folder, "a"), (pipeline_folder, "b"), (exported, "c")):
        assert main(["sample", str(target), *options, "--output", str(tmp_path / folder)]) == 0
    first, again, trained = (files(tmp_path / folder) for folder in "abc")
    assert [name[:15] for name in first] == ["000-a-blue-cros"]
    assert first == again
    assert capsys.readouterr().err == f"warning: prompts: {LONG_IS_CUT}\n" * 3
    assert first != trained


def test_the_grid_shows_the_base_model_above_the_trained_one(make_config: MakeConfig, tmp_path: Path) -> None:
    options = ("model.tune=lora", "train.learning_rate=0.1", "train.iterations=1")
    config = make_config(tmp_path, *SHORT, *options, "evaluation.limit_prompts=1")
    folder = train(config, display=Display(quiet=True))
    given = ["a red circle", "--count", "1", "-q", "--output", str(tmp_path / "run")]
    assert main(["sample", str(folder), *given]) == 0
    with (
        Image.open(tmp_path / "run" / "grid.png") as grid,
        Image.open(tmp_path / "run" / "000-a-red-circle-00.png") as trained,
    ):
        tile = trained.resize((160, 160), Image.Resampling.NEAREST)
        columns = (14, 174)
        shown = [np.asarray(grid.crop((columns[0], top, columns[1], top + 160))) for top in (14, 14 + 222)]
    assert (shown[1] == np.asarray(tile)).all()
    assert (shown[0] != shown[1]).any()


def test_sample_of_a_flow(tmp_path: Path) -> None:
    place = save_tiny("sd3", tmp_path / "model")
    found = []
    for number, options in enumerate(([], [], ["--noise-level", "0.5"])):
        output = tmp_path / str(number)
        arguments = ["sample", str(place), "a red circle", "--count", "1", "--steps", "2", *options]
        assert main([*arguments, "--output", str(output), "-q"]) == 0
        found.append(next(iter(files(output).values())))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["eval", "NOWHERE"], 2, "is not a run's folder: there is no config.yaml in it"),
        (["eval", "PIPELINE"], 2, "is not a run's folder: there is no config.yaml in it"),
        (["eval", "RUN", "--prompts", "nowhere.txt"], 2, "prompts 'nowhere.txt': no such file"),
        (["eval", "RUN", "--output", "FILE/scores.json"], 1, "cannot write in "),
        (["eval", "RUN", "--output", "FOLDER"], 1, "cannot write in "),
        (["sample", "./NOWHERE", "a cat"], 2, "model.pretrained: no such folder or file: "),
        (["sample", "RUN", "a cat", "--output", "FILE"], 1, "cannot write in "),
        (["sample", "RUN", "a cat", "--steps", "2000"], 2, "cannot be used: "),
        (
            ["sample", "RUN", "a cat", "--noise-level", "0.5"],
            2,
            "noise_level belongs to flow-matching models",
        ),
        (["sample", "FRESH", "a cat"], 1, "has no checkpoint that can be used"),
        (["eval", "FRESH"], 1, "has no checkpoint that can be used"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    reason: str,
    finished: Path,
    pipeline_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    places = {
        "NOWHERE": tmp_path / "nowhere",
        "PIPELINE": pipeline_folder,
        "RUN": finished,
        "FILE": tmp_path / "file",
        "FOLDER": tmp_path / "folder",
        "FRESH": tmp_path / "fresh",
    }

    def filled(argument: str) -> str:
        for name, place in places.items():
            argument = argument.replace(name, str(place))
        return argument

    assert main([filled(argument) for argument in arguments]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line


def test_a_checkpoint_of_another_model_is_refused(
    finished: Path, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (finished / "config.yaml").read_text("utf-8").replace("tune: full", "tune: lora")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "checkpoints").symlink_to(finished / "checkpoints")
    assert main(["eval", str(tmp_path), "-q"]) == 1
    assert f"does not hold the weights of {str(pipeline_folder)!r}" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "checkpoints" / "iteration-000002" / "policy.safetensors").write_bytes(b"")
    assert main(["sample", str(folder), "a red circle", "--count", "1", "-q", "-o", str(tmp_path / "o")]) == 0
    warning = " ".join(capsys.readouterr().err.split())
    assert "policy.safetensors has 0 bytes" in warning
    assert warning.endswith("using the one before it")
