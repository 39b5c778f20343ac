from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler

from loopfast.config import RewardConfig
from loopfast.prompts import Prompt
from loopfast.schedules import TransitionSchedule, transition_schedule
from loopfast.system.plugins import source_file
from loopfast.training.identity import (
    changed,
    describe_changes,
    prompts_identity,
    reward_identity,
    sampled_identity,
)

CAT, DOG = Prompt("a cat"), Prompt("a dog", {"category": "animal", "aspects": ["fur"]})


@pytest.mark.parametrize(
    "others",
    [
        [DOG, CAT],
        [CAT],
        [CAT, Prompt("a dog")],
        [CAT, Prompt("a dog", {"category": "animal", "aspects": ["paw"]})],
        [CAT, Prompt("a dog ", DOG.metadata)],
        [Prompt("a cat\ud800"), DOG],
    ],
)
def test_prompts_are_their_texts_metadata_and_order(others: list[Prompt]) -> None:
    assert prompts_identity(others) != prompts_identity([CAT, DOG])
    assert prompts_identity(others) == prompts_identity(others)


def test_metadata_that_json_cannot_hold_is_the_same_in_the_next_process() -> None:
    def prompts() -> list[Prompt]:
        return [
            Prompt("a cat", {"box": object(), "keys": {1: 2, (3,): 4}}),
            Prompt("a dog", {"b": 1, "a": 2}),
        ]

    assert prompts_identity(prompts()) == prompts_identity(prompts())
    assert prompts_identity([Prompt("a", {"b": 1, "a": 2})]) == prompts_identity(
        [Prompt("a", {"a": 2, "b": 1})]
    )


def test_a_users_reward_is_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "judge_of_identity.py"
    terms = [
        RewardConfig(name="judge_of_identity:reward"),
        RewardConfig(name="jpeg_compressibility"),
        RewardConfig(name="builtins:len", label="length"),
    ]
    found = []
    for text in ("def reward(): ...", "def reward(): ...", "def reward(): 1"):
        file.write_text(text, "utf-8")
        found.append(reward_identity(terms))
    assert list(found[0]) == ["the file of reward 'judge_of_identity:reward'"]
    assert found[0] == found[1] != found[2]
    file.unlink()
    assert reward_identity(terms) == {}


@pytest.mark.parametrize("reference", ["nowhere_at_all:reward", "nowhere_at_all.inside:reward", "sys:exit"])
def test_a_module_without_a_file_has_none(reference: str) -> None:
    assert source_file(reference) is None


@pytest.fixture
def schedule() -> TransitionSchedule:
    return transition_schedule(DDIMScheduler(clip_sample=False), 4)


def identity(schedule: TransitionSchedule, **changes: Any) -> dict[str, Any]:
    given = {"batch": [CAT, DOG], "rewards": {"reward": "1"}, "trained": (0, 1), "latent_shape": (4, 8, 8)}
    # as it comes out of a checkpoint
    found: dict[str, Any] = json.loads(json.dumps(sampled_identity(schedule=schedule, **(given | changes))))
    return found


Change = Callable[[TransitionSchedule], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda old: {"schedule": old}, None),
        # another processor's rounding is no other schedule
        (lambda old: {"schedule": replace(old, table64=old.table64 * (1 + 1e-9))}, None),
        (lambda old: {"schedule": replace(old, table64=old.table64 * 1.001)}, "the schedule"),
        (lambda old: {"schedule": replace(old, timesteps=old.timesteps + 1)}, "the schedule"),
        (lambda old: {"schedule": old, "trained": (1, 2)}, "the schedule"),
        (lambda old: {"schedule": old, "trained": (0,)}, "the schedule"),
        (lambda old: {"schedule": old, "batch": [DOG, CAT]}, "prompts.source"),
        (lambda old: {"schedule": old, "rewards": {"reward": "2"}}, "reward"),
        # nothing is known of it
        (lambda old: {"schedule": old, "rewards": {}}, None),
        (lambda old: {"schedule": old, "latent_shape": (4, 8, 16)}, "the latents' shape"),
    ],
)
def test_what_differs_is_named(change: Change, part: str | None, schedule: TransitionSchedule) -> None:
    found = changed(identity(schedule), identity(**change(schedule)))
    assert found == ([] if part is None else [part])


def test_changes_are_said_once() -> None:
    assert describe_changes(["prompts.source", "the schedule", "prompts.source"]) == (
        "prompts.source holds other prompts, the schedule is another"
    )
