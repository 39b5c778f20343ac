"""The comparison that says whether a broken run has lost anything sees what may be lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.outcomes import differences, leftovers, outcome


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a run, without what they would hold."""
    run = tmp_path / "run"
    state = {"engine": {"updates": 4}, "prompt_statistics": {}, "zero_gradient": 0.0, "seconds": 3.0}
    contents = {
        "checkpoints/iteration-000002/state.json": json.dumps(state),
        "checkpoints/iteration-000002/policy.safetensors": "weights",
        "checkpoints/iteration-000001/policy.safetensors": "earlier weights",
        "model/unet/weights.safetensors": "weights",
        "evaluation/iteration-000002.json": '{"reward": 0.5}',
        "images/iteration-000002.png": "pixels",
        "metrics.jsonl": "".join(
            f'{{"iteration": {number}, "loss": 0.{number}, "seconds": 1}}\n' for number in range(3)
        ),
    }
    for name, text in contents.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    return run


def lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        file = run / "metrics.jsonl"
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))

    return apply


def flipped(name: str) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[0] ^= 1
        (run / name).write_bytes(data)

    return apply


ITERATIONS = "iterations of metrics.jsonl"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            flipped("checkpoints/iteration-000002/policy.safetensors"),
            ["checkpoints/iteration-000002/policy.safetensors"],
        ),
        (flipped("model/unet/weights.safetensors"), ["model/unet/weights.safetensors"]),
        (flipped("images/iteration-000002.png"), ["images/iteration-000002.png"]),
        (lambda run: shutil.rmtree(run / "model"), ["model/unet/weights.safetensors"]),
        (
            lambda run: (run / "evaluation/iteration-000002.json").unlink(),
            ["evaluation/iteration-000002.json"],
        ),
        (
            lines(lambda text: text[:2]),
            [ITERATIONS, *(f"metrics.jsonl: {name} of iteration 2" for name in ("iteration", "loss"))],
        ),
        (lines(lambda text: [*text, text[-1]]), [ITERATIONS]),
        (
            lines(lambda text: [line.replace("0.1", "0.3") for line in text]),
            ["metrics.jsonl: loss of iteration 1"],
        ),
        (lines(lambda text: [line.replace('s": 1', 's": 2') for line in text]), []),
        (flipped("checkpoints/iteration-000001/policy.safetensors"), []),
    ],
    ids=[
        *("weights", "export", "image", "no export", "no evaluation", "missing iteration"),
        *("doubled iteration", "metric", "time", "earlier checkpoint"),
    ],
)
def test_what_differs_is_named(change: Callable[[Path], None], found: list[str], folder: Path) -> None:
    expected = outcome(folder)
    change(folder)
    assert differences(outcome(folder), expected) == found


def test_unfinished_files_are_named(folder: Path) -> None:
    assert leftovers(folder) == []
    (folder / "checkpoints" / ".tmp-iteration-000003").mkdir()
    assert leftovers(folder) == ["checkpoints/.tmp-iteration-000003"]
