"""``loopfast.train``: what it takes, what it returns, and that nothing is left behind."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

import loopfast
from loopfast.__main__ import main
from loopfast.config import Config, config_to_yaml
from loopfast.errors import CallbackError, ConfigError, Interrupted, RewardError, RunExistsError
from loopfast.run.tracking import describe
from loopfast.system import allocator
from loopfast.system.plugins import import_function

MakeConfig = Callable[..., Config]
FEW = ("train.iterations=2", "evaluation.limit_prompts=2", "rollout.prompts_per_iteration=2")
REWARD = "def brightness(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3))


def plain(run: loopfast.TrainedRun) -> list[dict[str, Any]]:
    """The metrics without those of the machine."""
    return [
        {
            name: value
            for name, value in line.items()
            if describe(name).section not in ("time", "speed") and "memory" not in name
        }
        for line in run.metrics
    ]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with a reward, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"api_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(REWARD)
    return name


def test_a_run_is_the_same_from_python_and_from_the_command_line(
    small_config: MakeConfig, module: str, tmp_path: Path
) -> None:
    config = small_config(*FEW)
    (tmp_path / "run.yaml").write_text(config_to_yaml(config), "utf-8")
    options = ["--set", f"reward=[{{name: '{module}:brightness'}}]", "--set", "train.inner_epochs=2"]
    assert main(["train", "run.yaml", *options, "--set", "run.name=command", "--quiet"]) == 0
    function = import_function(f"{module}:brightness")
    run = loopfast.train(
        "run.yaml", reward=function, train={"inner_epochs": 2}, run={"name": "python"}, quiet=True
    )
    other = loopfast.TrainedRun(run.folder.with_name("command"))
    assert plain(run) == plain(other)
    assert len(run.metrics) == 3
    assert run.config.reward == other.config.reward
    assert run.report.is_file()
    assert run.model == run.folder / "model"


@pytest.mark.parametrize("kind", ["file", "mapping", "object"])
def test_a_configuration_may_come_in_any_form(kind: str, small_config: MakeConfig, tmp_path: Path) -> None:
    config = small_config(*FEW, "train.iterations=1", "evaluation.every=0")
    given: dict[str, Any] = {"file": tmp_path / "c.yaml", "mapping": config.model_dump(), "object": config}
    given["mapping"]["model"]["lora"].pop("from_", None)
    (tmp_path / "c.yaml").write_text(config_to_yaml(config), "utf-8")
    run = loopfast.train(given[kind], run={"name": kind}, quiet=True, overrides=["run.seed=4"])
    assert run.config == config.model_copy(
        update={"run": config.run.model_copy(update={"name": kind, "seed": 4})}
    )


def everything() -> dict[str, Any]:
    """What a run must leave as it was."""
    backends = torch.backends
    return {
        "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
        "torch threads": torch.get_num_threads(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "verbosity": [log.get_verbosity() for log in (diffusers_logging, transformers_logging)],
        "bars": [log.is_progress_bar_enabled() for log in (diffusers_logging, transformers_logging)],
        "arithmetic": (
            backends.cuda.matmul.allow_tf32,
            backends.cudnn.allow_tf32,
            backends.cudnn.deterministic,
            backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        ),
        "random": torch.get_rng_state().tolist(),
        "interrupts": gc.isenabled(),
    }


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_nothing_is_left_behind_and_it_can_be_called_again(
    ends: str, small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reward(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        if ends != "well":
            raise ZeroDivisionError("no luck")
        return images.mean((1, 2, 3))

    monkeypatch.setattr(
        allocator, "reuse_freed_memory", lambda: pytest.fail("the process's allocator was set")
    )
    config = small_config(*FEW, "run.trackers=[tensorboard]")
    settings: dict[str, Any] = {
        "model": {"deterministic": True},
        "rollout": {"reward_worker": "thread"},
        "train": {"iterations": 1},
        "quiet": True,
    }
    before = everything()
    for name in ("first", "second"):
        if ends == "well":
            loopfast.train(config, reward=reward, run={"name": name}, **settings)
        else:
            with pytest.raises(RewardError, match="no luck"):
                loopfast.train(config, reward=reward, run={"name": name}, **settings)
        assert everything() == before


def test_callbacks_see_the_iteration_and_may_end_the_run(small_config: MakeConfig) -> None:
    seen: list[loopfast.Iteration] = []

    def on_iteration(iteration: loopfast.Iteration) -> str:
        seen.append(iteration)
        assert iteration.rewards is not None
        torch.testing.assert_close(iteration.rewards.flatten(), brightness(iteration.images(), [], []))
        if iteration.number == 2:
            iteration.stop()
        return "what a callback returns is nothing to us"

    config = small_config(*FEW, "train.iterations=9", "evaluation.every=0")
    run = loopfast.train(config, reward=brightness, callbacks=[on_iteration], quiet=True)
    assert [iteration.number for iteration in seen] == [1, 2]
    first, second = seen
    assert [prompt.text for prompt in first.prompts] != [prompt.text for prompt in second.prompts]
    assert first.rewards is not None
    assert first.rewards.shape == (2, 2)
    assert first.trajectories is not None
    assert first.trajectories.latents.shape[:2] == (3, 4)
    assert first.metrics["reward_mean"] == pytest.approx(first.rewards.mean().item())
    # the last iteration is evaluated, recorded, saved and exported, as that of any run
    lines = run.metrics
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert ["eval_reward" in line for line in lines] == [True, False, True]
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir())[-1] == "iteration-000002"
    assert run.report.is_file()
    # and it can go on
    longer = loopfast.train(config, reward=brightness, train={"iterations": 3}, resume="auto", quiet=True)
    assert [line["iteration"] for line in longer.metrics] == [0, 1, 2, 3]


def test_a_callback_that_raises_loses_nothing(small_config: MakeConfig) -> None:
    def fails(iteration: loopfast.Iteration) -> None:
        if iteration.number == 1:
            raise ZeroDivisionError("no luck")

    config = small_config(*FEW)
    with pytest.raises(
        CallbackError, match=r"iteration 1: callback .*fails raised ZeroDivisionError"
    ) as caught:
        loopfast.train(config, callbacks=[fails], quiet=True)
    assert str(caught.value).endswith("iteration-000001 is saved, --resume auto goes on from there")
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, ZeroDivisionError):
        cause = cause.__cause__
    assert cause is not None
    again: list[loopfast.Iteration] = []
    run = loopfast.train(config, callbacks=[again.append], resume="auto", quiet=True)
    unbroken = loopfast.train(config, run={"name": "unbroken"}, quiet=True)
    assert plain(run) == plain(unbroken)
    # what was sampled before the error is gone
    assert [(found.number, found.rewards is None) for found in again] == [(1, True), (2, False)]
    with pytest.raises(ValueError, match="the images of this iteration are gone"):
        again[0].images()


def test_a_signal_in_a_callback_saves_and_ends_the_run(small_config: MakeConfig) -> None:
    config = small_config(*FEW)
    with pytest.raises(Interrupted, match="iteration-000001 is saved"):
        loopfast.train(config, callbacks=[lambda _: os.kill(os.getpid(), signal.SIGTERM)], quiet=True)


def test_prompts_are_texts_and_resumed_by_name(small_config: MakeConfig) -> None:
    config = small_config(*FEW, "train.iterations=1", "prompts.source=embedded:shape")
    texts = (text for text in ("a red circle", "  a blue square "))
    held_out = [loopfast.Prompt("a green ring", {"category": "rings", "bonus": 2})]
    run = loopfast.train(config, prompts=texts, evaluation={"prompts": held_out}, quiet=True)
    lines = (run.folder / "prompts.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "a red circle"},
        {"prompt": "  a blue square "},
    ]
    record = json.loads((run.folder / "evaluation" / "iteration-000001.json").read_text("utf-8"))
    assert [(item["prompt"], item["category"]) for item in record["items"]] == [("a green ring", "rings")]
    # the command line knows them by their files
    again = [
        "train",
        str(run.folder / "config.yaml"),
        "--set",
        "train.iterations=2",
        "--resume",
        "auto",
        "-q",
    ]
    assert main(again) == 0
    assert [line["iteration"] for line in run.metrics] == [0, 1, 2]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_pipeline_object_is_copied_and_what_was_learned_comes_back_as_one(
    tune: str, small_config: MakeConfig, pipeline_folder: Path
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(1.5)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    config = small_config(*FEW, "train.iterations=1", "model.device=cpu", "model.lora.rank=2")
    run = loopfast.train(config, model={"pretrained": pipeline, "tune": tune}, quiet=True)
    assert run.config.model.pretrained == str(run.folder / "base")
    assert all(torch.equal(before[name], value) for name, value in pipeline.unet.state_dict().items())
    learned = run.pipeline()
    assert type(learned) is StableDiffusionPipeline
    assert type(learned.unet) is type(pipeline.unet)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}
    drawn = [
        each("a red circle", generator=torch.Generator().manual_seed(0), **options).images
        for each in (pipeline, learned, run.pipeline())
    ]
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[1], drawn[2])
    # a resumed run goes on from the copy
    with torch.no_grad():
        pipeline.unet.conv_in.weight.zero_()
    longer = loopfast.train(
        config,
        model={"pretrained": pipeline, "tune": tune},
        train={"iterations": 2},
        resume="auto",
        quiet=True,
    )
    base = StableDiffusionPipeline.from_pretrained(longer.folder / "base")
    assert torch.equal(base.unet.conv_in.weight, before["conv_in.weight"])


def test_a_pipeline_is_not_written_over_another_runs(small_config: MakeConfig, pipeline_folder: Path) -> None:
    config = small_config(*FEW, "train.iterations=1")
    run = loopfast.train(config, quiet=True)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    with pytest.raises(
        RunExistsError, match=r'go on with it \(resume="auto"\), .* \(run=\{"name": "small-2"\}\)'
    ):
        loopfast.train(config, model=pipeline, prompts=["a red circle"], quiet=True)
    assert not {"base", "prompts.jsonl"} & {path.name for path in run.folder.iterdir()}


def test_what_was_given_is_written_only_into_a_run_that_goes_on(
    small_config: MakeConfig, pipeline_folder: Path
) -> None:
    config = small_config(*FEW, "train.iterations=1")
    run = loopfast.train(config, prompts=["a red circle", "a blue square"], quiet=True)
    kept = (run.folder / "prompts.jsonl").read_bytes()
    # neither a resumption with other settings nor a branch into this folder touches its prompts
    for change, resume in (
        ({"seed": 7}, "auto"),
        ({"name": run.folder.name}, str(pipeline_folder / "a" / "b")),
    ):
        with pytest.raises((ConfigError, RunExistsError)):
            loopfast.train(config, prompts=["a star"], run=change, resume=resume, quiet=True)
        assert (run.folder / "prompts.jsonl").read_bytes() == kept


def test_a_pipeline_that_nothing_was_trained_of_gives_way(
    small_config: MakeConfig, pipeline_folder: Path
) -> None:
    config = small_config(*FEW, "train.iterations=1", "model.device=cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    lora = {"pretrained": pipeline, "tune": "lora", "lora": {"targets": ["nothing"]}}
    with pytest.raises(ConfigError, match=r"model\.lora\.targets"):
        loopfast.train(config, model=lora, quiet=True)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(1.5)
    run = loopfast.train(config, model=pipeline, resume="auto", quiet=True)
    base = StableDiffusionPipeline.from_pretrained(run.folder / "base")
    assert torch.equal(base.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_a_function_without_a_name_suffers_at_resumption_only(
    small_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config, reward = (
        small_config(*FEW, "evaluation.every=1"),
        lambda images, prompts, metadata: images.mean((1, 2, 3)),
    )
    unbroken = loopfast.train(config, reward=reward, run={"name": "unbroken"}, quiet=True)
    warned = capsys.readouterr().err.replace("\n", " ")
    assert warned.startswith(
        "warning: reward <lambda> is an object that a checkpoint cannot name: to resume this run, call"
    )
    loopfast.train(config, reward=reward, train={"iterations": 1}, quiet=True)
    folder = unbroken.folder.with_name("small")
    assert main(["train", str(folder / "config.yaml"), "--resume", "auto"]) == 2
    assert "error: reward '<lambda>' is an object that a Python program gave" in capsys.readouterr().err
    run = loopfast.train(config, reward=reward, resume="auto", quiet=True)
    assert plain(run) == plain(unbroken)
    assert "reward_lambda" in run.metrics[1]
    with pytest.raises(
        ConfigError, match=r"rollout\.reward_worker: found process, allowed: .* reward <lambda>"
    ):
        loopfast.train(config, reward=reward, rollout={"reward_worker": "process"}, run={"name": "p"})


def test_what_is_wrong_names_the_argument(small_config: MakeConfig) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"train": {"iterations": "x"}}, r"^argument train: train\.iterations: found 'x', allowed: a whole number"),
        ({"trian": {}}, r"^argument trian: unknown key 'trian'; nearest known key: 'train"),
        ({"train": {"learning_rat": 1}}, r"unknown key 'train\.learning_rat'; nearest known key: 'train\.learning_r"),
        ({"reward": lambda images: 1}, r"reward '<lambda>', which takes \(images\), cannot be called with"),
        ({"reward": object()}, r"^argument reward: reward\.0\.name: found an object of type object, allowed: text"),
        ({"prompts": [1]}, r"^prompts\.source: item 0 is int; allowed: text or a Prompt"),
        ({"prompts": []}, r"^prompts\.source: there is no prompt in it"),
        ({"prompts": [" "]}, r"^prompts\.source: item 0 is empty"),
        ({"prompts": [loopfast.Prompt("x", {"a": object()})]}, r"the metadata of item 0 cannot be written"),
        ({"prompts": [loopfast.Prompt("x", {"Prompt": 1})]}, r"the metadata of item 0 has the key 'Prompt'"),
        ({"model": "/nowhere/at/all"}, r"no such folder or file"),
        ({"algorithm": {"samples_per_prompt": 1}}, r"^argument algorithm: algorithm\.samples_per_prompt: found 1"),
    ]  # fmt: skip
    config = small_config(*FEW)
    for arguments, reason in wrong:
        with pytest.raises(ConfigError, match=reason):
            loopfast.train(config, quiet=True, **arguments)
    with pytest.raises(ConfigError, match=r"^config: found int, allowed: a recipe's name"):
        loopfast.train(3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        loopfast.trian  # type: ignore[attr-defined]  # noqa: B018


def test_a_run_that_has_not_ended_has_no_pipeline_yet(tmp_path: Path, small_config: MakeConfig) -> None:
    (tmp_path / "config.yaml").write_text(config_to_yaml(small_config()), "utf-8")
    with pytest.raises(ConfigError, match="model is not there: a run exports its model when it ends"):
        loopfast.TrainedRun(tmp_path).pipeline()
    with pytest.raises(ConfigError, match="is not a run's folder"):
        loopfast.TrainedRun(tmp_path / "nowhere").config.run  # noqa: B018
