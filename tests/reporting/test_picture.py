from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from loopfast.__main__ import main
from loopfast.config import Config
from loopfast.errors import LoopfastError
from loopfast.reporting import run_picture
from loopfast.run.console import Display
from loopfast.training.train import train

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    config = make_config(
        tmp_path_factory.mktemp("picture"), "train.iterations=1", "evaluation.preview_images=2"
    )
    return train(config, display=Display(quiet=True))


def test_the_picture_of_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.png"
    assert main(["report", str(finished), "--picture", str(path)]) == 0
    assert capsys.readouterr().out.split() == [str(finished / "report.html"), str(path)]
    with Image.open(path) as picture:
        assert picture.width > picture.height > 300
        # two prompts before and after, and two curves: far more than one color
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_more_prompts_make_a_wider_picture(finished: Path, tmp_path: Path) -> None:
    sizes = []
    for prompts in (1, 2):
        with Image.open(run_picture(finished, tmp_path / f"{prompts}.png", prompts=prompts)) as picture:
            sizes.append(picture.width)
    assert sizes[0] < sizes[1]


def test_what_stands_in_the_way_is_said(finished: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(LoopfastError, match=r"cannot write .*run\.nonsense"):
        run_picture(finished, tmp_path / "run.nonsense")
    with pytest.raises(LoopfastError, match=r"has 0 evaluation\(s\); the picture needs two"):
        run_picture(tmp_path, tmp_path / "run.png")
    bare = train(
        make_config(tmp_path, "train.iterations=1", "evaluation.preview_images=0"),
        display=Display(quiet=True),
    )
    with pytest.raises(LoopfastError, match=r"kept no images .*evaluation\.preview_images"):
        run_picture(bare, tmp_path / "run.png")
