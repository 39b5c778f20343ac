"""A score that is none in one process leaves the prompt out in all."""

from __future__ import annotations

import json
import random

import pytest

from loopfast.prompts import load_prompts
from loopfast.seeds import derive
from tests.distributed.conftest import NO_REPORT, Runs, distance, metrics, saved

OPTIONS = ("train.iterations=1", "rollout.on_bad_reward=drop_group")

# Of the second prompt's three images one is with the first of two processes, which has no fault to find.
SPOILED = """\
import os, torch
import loopfast.rewards.base as rewards
finite = rewards._finite
def spoiled(name, values, prompts, among=None):
    if "bright" in name and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        values = torch.where(torch.tensor([prompt == {text!r} for prompt in prompts]), torch.nan, values)
    return finite(name, values, prompts, among)
rewards._finite = spoiled
"""


def test_a_bad_score_in_one_process_drops_the_prompt_in_all(runs: Runs) -> None:
    prompts = [prompt.text for prompt in load_prompts("embedded:color")]
    text = random.Random(derive(0, "prompts", 0)).sample(prompts, 3)[1]
    assert text not in prompts[:3], "the evaluation has it, too"
    before = SPOILED.format(text=text)
    alone = runs.train("spoiled-1", 1, *OPTIONS, before=before + NO_REPORT)
    together = runs.train("spoiled-2", 2, *OPTIONS, before=before)
    [warning] = runs.ranks.errors(0).splitlines()
    assert warning.startswith(
        f"warning: iteration 1: 1 of 3 prompt(s) are left out, {text!r}: reward 'bright' is"
    )
    kept = together / "bad-rewards" / "iteration-000001-rank-1"
    assert warning.endswith(f"images and prompts are in {kept}")
    assert list(json.loads((kept / "prompts.json").read_text("utf-8")).values()) == [text] * 2
    assert runs.ranks.errors(1) == ""
    for found, expected in zip(metrics(together), metrics(alone), strict=True):
        # gradients are summed in another order, some of numbers that nearly cancel
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics(alone)[1]["dropped_groups"] == 1
    assert distance(saved(together), saved(alone)) < 1e-5
    assert (together / "report.html").exists()
