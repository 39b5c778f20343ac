from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loopfast.config import Config
from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.distributed.world import SINGLE_PROCESS, World
from loopfast.policies import TextLimit
from loopfast.prompts import Prompt, PromptList
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.training.facts import announce, conclude, describe_rollout, describe_run
from loopfast.training.microbatch import Microbatches
from tests.training.toys import MakeToy, toy_config

MakeConfig = Callable[..., Config]
QUIET = Display(quiet=True)


@pytest.mark.parametrize(
    ("overrides", "trained", "said"),
    [
        ((), (0, 1, 2, 3), "4 of 4 trained"),
        (("train.steps=auto",), (0, 1, 2), "3 of 4 trained, not 3 (each would outweigh the others)"),
        ((), (0, 1, 2), "3 of 4 trained, not 3 (deterministic)"),
        (("train.steps=1:3",), (1, 2), "2 of 4 trained, not 0, 3"),
    ],
)
def test_the_header_says_what_is_trained(
    overrides: tuple[str, ...], trained: tuple[int, ...], said: str, small_config: MakeConfig
) -> None:
    config = small_config("train.inner_epochs=3", "rollout.steps=4", *overrides)
    policy = SimpleNamespace(
        describe=lambda: "the model",
        device=torch.device("cpu"),
        performance_options={"attention": "sdpa", "tf32": False},
    )
    trainer: Any = SimpleNamespace(
        config=config,
        sampler=SimpleNamespace(policy=policy, model=policy, rollout_copy=None),
        steps=SimpleNamespace(trained_steps=trained, count=len(trained), window=None),
        trained_per_trajectory=len(trained),
        screening="auto",
        reward_worker="none",
        microbatches=Microbatches(4, "auto", 8, QUIET.warning),
        prompts=PromptList(Prompt(str(number)) for number in range(9)),
        folder=RunFolder(config),
        world=SINGLE_PROCESS,
    )
    facts = dict(describe_run(trainer))
    assert facts["steps"] == said
    assert facts["model"] == "the model"
    assert facts["algorithm"] == "loop, K = 2, learning rate 0.0001"
    assert facts["prompts"] == "9 prompts from embedded:color"
    assert facts["an iteration"] == f"8 images, 6 updates of {8 * len(trained) // 2} pairs"
    assert facts["reward"] == "1 x jpeg_compressibility, 0 x jpeg_incompressibility"
    assert facts["device"].startswith(f"cpu, {torch.get_num_threads()} thread(s)")
    assert facts["speed"] == "attention sdpa, tf32 off, screening auto"
    assert facts["rollout"].endswith("CUDA graph off, replica off, reward worker none")
    assert facts["memory"].startswith(
        "microbatch 4 in rollout, 4 (auto) in replay, gradient checkpointing off"
    )
    assert facts["run"] == str(RunFolder(config).path)


@pytest.mark.parametrize(
    ("overrides", "fact", "said"),
    [
        (("rollout.stochastic_steps=window:2",), "steps", "2 of 3 trained, a window of 3"),
        (("train.step_fraction=0.7",), "steps", "3 of 3 trained; 2 of them drawn for a pass"),
        (("train.step_fraction=0.7",), "an iteration", "6 images, 3 updates of 4 pairs"),
        (("algorithm.kl_weight=0.1",), "speed", "attention none, screening off"),
        (("model.vae_tiling=true",), "memory", "VAE tiling on, text encoder kept"),
        ((), "processes", "1"),
    ],
)
def test_the_header_names_levers(overrides: tuple[str, ...], fact: str, said: str, make_toy: MakeToy) -> None:
    facts = dict(describe_run(make_toy(*overrides).run))
    assert facts[fact].endswith(said)


@pytest.mark.parametrize(
    ("size", "offload", "said"),
    [(2, "none", "2, ZeRO stage 2"), (4, "optimizer", "4, ZeRO stage 2, optimizer offloaded to the host")],
)
def test_the_header_counts_processes(
    size: int, offload: str, said: str, make_toy: MakeToy, tmp_path: Path
) -> None:
    toy = make_toy()
    toy.run.config = toy_config(tmp_path, "distributed.zero_stage=2", f"distributed.offload={offload}")
    toy.run.world = World(LaunchEnvironment(size=size))
    assert dict(describe_run(toy.run))["processes"] == said


@pytest.mark.parametrize(
    ("overrides", "replica"),
    [
        ((), "off"),
        (("rollout.replica=resident",), "float32 on cpu"),
        (
            ("rollout.dtype=bfloat16", "rollout.replica=gathered"),
            "bfloat16 on cpu, gathered for each rollout",
        ),
        (("model.tune=lora", "rollout.merge_lora=true"), "float32 on cpu, LoRA merged"),
    ],
)
def test_the_model_that_is_sampled_from_is_described(
    overrides: tuple[str, ...], replica: str, make_toy: MakeToy
) -> None:
    assert describe_rollout(make_toy(*overrides).run) == (
        f"stochastic steps all, CUDA graph off, replica {replica}, reward worker inline"
    )


def test_a_graph_is_recorded_on_a_gpu_where_it_is_not_switched_off(make_toy: MakeToy) -> None:
    for switch in ("true", "false"):
        toy = make_toy(f"rollout.cuda_graph={switch}")
        toy.policy.device = torch.device("cuda")
        assert f"CUDA graph {'on' if switch == 'true' else 'off'}" in describe_rollout(toy.run)
        toy.policy.device = torch.device("cpu")


def test_a_run_is_announced_with_its_facts(make_toy: MakeToy) -> None:
    toy = make_toy("train.iterations=7")
    toy.state.iteration = 3
    announce(toy.run, toy.state)
    facts = describe_run(toy.run)
    title, *lines = toy.heard.text.getvalue().splitlines()
    assert title == "loopfast train"
    assert [line.split(maxsplit=1)[0] for line in lines] == [name.split()[0] for name, _ in facts]
    assert all(line.endswith(value) for line, (_, value) in zip(lines, facts, strict=True))
    summary = json.loads((toy.run.folder.path / "summary.json").read_text("utf-8"))
    assert summary == {"facts": [[*fact] for fact in facts]}
    assert toy.heard.warnings == []
    # progress begins where the run stands: the time that is left is known after an iteration more
    for iteration in (3, 4):
        toy.run.display.advance({"iteration": iteration})
    third, fourth = toy.heard.text.getvalue().splitlines()[-2:]
    assert third == "iteration 3/7"
    assert fourth.startswith("iteration 4/7  ")
    assert fourth.endswith(" left")


class Words:
    """A tokenizer whose tokens are words."""

    is_fast = False

    def __call__(self, texts: Any, *, max_length: int = 99, **options: Any) -> dict[str, list[list[int]]]:
        self.known: list[str] = getattr(self, "known", [])
        words = [text.split()[:max_length] for text in texts]
        self.known += sorted({word for row in words for word in row} - {*self.known})
        return {"input_ids": [[self.known.index(word) for word in row] for row in words]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(self.known[number] for number in ids)


@pytest.mark.parametrize(
    ("evaluated", "said"),
    [
        ("prompts.txt", ["prompts.txt: 1 of 2 is", "'a green triangle and'"]),
        (
            "others.txt",
            [
                "prompts.txt: 1 of 2 is",
                "'a green triangle and'",
                "others.txt: 1 of 2 is",
                "'a white cross on'",
            ],
        ),
    ],
)
def test_prompts_that_are_not_read_to_their_end_are_said_by_source(
    evaluated: str, said: list[str], make_toy: MakeToy, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na green triangle and more", "utf-8")
    (tmp_path / "others.txt").write_text("a blue star\na white cross on black\na white cross on red", "utf-8")
    toy = make_toy(
        f"prompts.source={tmp_path / 'prompts.txt'}",
        f"evaluation.prompts={tmp_path / evaluated}",
        "evaluation.limit_prompts=2",
    )
    toy.policy.text_limits = (TextLimit("CLIP", 4, Words()),)
    announce(toy.run, toy.state)
    found = [text for warning in toy.heard.warnings for text in said if text in warning]
    assert found == said
    assert len(toy.heard.warnings) == len(said) // 2
    assert all(warning.endswith("(loopfast config check lists them)") for warning in toy.heard.warnings)


@pytest.mark.parametrize("deviation", [0.0, 0.00321])
def test_what_came_out_of_a_run_is_summed_up(deviation: float, make_toy: MakeToy) -> None:
    toy = make_toy()
    toy.state.images = 24
    assert toy.run.tracker is not None
    for line in (
        {"iteration": 0, "eval_reward": 0.25, "seconds": 3.0},
        {"iteration": 1, "seconds": 5.0, "ratio_max_deviation": deviation},
        {"iteration": 2, "eval_reward": 1.5, "seconds": 8.4, "ratio_max_deviation": deviation / 2},
        {"iteration": 3, "seconds": 9.9},
    ):
        toy.run.tracker.record(line)
    conclude(toy.run, toy.state, Path("the/model"), Path("the/report"))
    assert [re.split("  +", line.strip()) for line in toy.heard.text.getvalue().splitlines()] == [
        ["base reward", "0.250"],
        ["final reward", "1.500 (+1.250)"],
        ["images", "24"],
        ["time", "8 s"],
        *([["ratio off by", "0.0032 at first"]] if deviation else []),
        ["model", "the/model"],
        ["report", "the/report"],
    ]
