from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
from rich.console import Console

from loopfast.__main__ import main
from loopfast.config import RewardConfig
from loopfast.errors import ConfigError
from loopfast.rewards import REWARDS, build_rewards
from loopfast.rewards.listing import all_rewards, one_reward, options_of
from tests.forks import printed


def shown(what: object, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_every_reward_has_a_row() -> None:
    lines = shown(all_rewards()).splitlines()
    for name, info in REWARDS.items():
        [row] = [line for line in lines if line.startswith(f"│ {name} ")]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        facts = (info.range, info.weights or "none", info.license or "none", info.extra or "train")
        for cell, fact in zip(cells[1:], facts, strict=True):
            assert cell
            assert fact.startswith(cell)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_describes_its_options(name: str) -> None:
    options = options_of(REWARDS[name].make)
    assert [option for option, _, _ in options] == list(inspect.signature(REWARDS[name].make).parameters)
    for option, _, meaning in options:
        assert meaning, f"{name}: {option}"
    text = shown(one_reward(name))
    assert f"{name}: {REWARDS[name].summary}" in text.splitlines()
    assert "Args:" not in text
    assert "Raises:" not in text


@pytest.mark.parametrize("name", [name for name, info in REWARDS.items() if info.weights])
def test_rewards_with_weights_say_what_may_be_done_with_them(name: str) -> None:
    assert REWARDS[name].license


def test_options_have_defaults_as_yaml() -> None:
    options = {
        option: (default, meaning) for option, default, meaning in options_of(REWARDS["pickscore"].make)
    }
    assert options["weights"][0] == '"yuvalkirstain/PickScore_v1"'
    assert options["processor"][0] == "null"
    assert options["batch_size"] == ("8", "images per model call.")
    assert options["dtype"] == ('"float32"', "float32, float16 or bfloat16.")


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["rewards"]) == 0
    table = capsys.readouterr().out
    assert all(f" {name} " in table for name in REWARDS)
    assert main(["rewards", "aesthetic"]) == 0
    assert "sac+logos+ava1-l14-linearMSE.pth" in capsys.readouterr().out
    assert main(["rewards", "aestetic"]) == 2
    assert "no reward 'aestetic'; nearest: 'aesthetic'" in capsys.readouterr().err


def test_listing_and_checking_load_no_model_libraries() -> None:
    program = """
import sys
from pathlib import Path
from loopfast.config import RewardConfig
from loopfast.rewards import build_rewards
from loopfast.rewards.listing import all_rewards
all_rewards()
build_rewards([RewardConfig(name=name) for name in ("aesthetic", "image_reward")], load=False)
print([name for name in ("transformers", "diffusers", "safetensors") if name in sys.modules])
"""
    assert printed(program).strip() == "[]"


def test_weights_are_missed_before_anything_is_scored() -> None:
    term = RewardConfig(name="aesthetic", options={"weights": "./nowhere"})
    for load in (True, False):
        with pytest.raises(ConfigError, match=r"reward 'aesthetic': weights: '\./nowhere' is not there"):
            build_rewards([term], load=load)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    term = RewardConfig(name="clip_score", options={"weights": str(clip_folder), "device": "cpu"})
    assert build_rewards([term], load=False).terms
    with pytest.raises(ConfigError) as caught:
        build_rewards([term])
    assert "reward 'clip_score' needs the extra 'train'" in str(caught.value)
    assert "pip install 'loopfast[train]'" in str(caught.value)


def test_the_document_has_the_same_table() -> None:
    document = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text("utf-8")
    for name, info in REWARDS.items():
        facts = (info.range, info.weights or "none", info.license or "none", info.extra or "train")
        assert f"| `{name}` | {info.summary} | {' | '.join(facts)} |\n" in document, name
