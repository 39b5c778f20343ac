"""The EMA of the trained weights: its updates and its uses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from loopfast.config import parse_config
from loopfast.engines.ema import EMAWeights
from loopfast.errors import ConfigError
from loopfast.run.checkpoints import CheckpointStore
from loopfast.run.console import Display
from loopfast.run.tracking import read_metrics
from loopfast.training.train import train
from tests.conftest import MakeConfig

SHORT = ("rollout.prompts_per_iteration=2", "rollout.steps=2", "evaluation.limit_prompts=1")
EMA = ("model.tune=lora", "train.ema_decay=0.7", "train.learning_rate=1e-2", "train.iterations=2", *SHORT)
PLAIN = tuple(option for option in EMA if "ema" not in option)


def test_it_follows_its_formula() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    average = EMAWeights({"p": parameter}, 0.3)
    expected = parameter.detach().double()
    for n in range(1, 5):
        with torch.no_grad():
            parameter += n
        average.update(n)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    assert average.weights["p"].dtype == torch.float32
    torch.testing.assert_close(average.weights["p"].double(), expected, atol=1e-6, rtol=1e-6)


class Operators(TorchDispatchMode):
    """A mode that records the called operators."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def test_an_update_is_one_operator_however_many_parameters_there_are() -> None:
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (5,), (2, 7)] * 10
    parameters = {str(index): torch.nn.Parameter(torch.randn(shape)) for index, shape in enumerate(shapes)}
    for parameter in parameters.values():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    average = EMAWeights(parameters, 0.9)
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(1.0)
            expected[name].lerp_(parameter, 1 - 2 / 11)
    with Operators() as operators:
        average.update(1)
    assert operators.called == ["aten._foreach_lerp_.Scalar"]
    with Operators() as operators, average.applied():
        assert operators.called.count("aten._foreach_copy_.default") == 1
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), expected[name])
    # kernels over lists go through them one by one where two tensors are laid out differently
    assert [average.weights[name].stride() for name in parameters] == [
        p.stride() for p in parameters.values()
    ]


def test_the_weights_come_back_after_an_error() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    average = EMAWeights({"p": parameter}, 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)

    def fail() -> None:
        with average.applied():
            assert parameter.tolist() == [1.0, 1.0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert parameter.tolist() == [3.0, 3.0]


def weights(run: Path) -> dict[str, Any]:
    checkpoint = CheckpointStore(run / "checkpoints", keep=1, keep_best=False).latest(print)
    assert checkpoint is not None
    return checkpoint.tensors


@pytest.fixture(scope="module")
def run(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(make_config(tmp_path_factory.mktemp("ema"), *EMA), display=Display.silent())


def test_evaluations_and_exports_are_the_averages(run: Path, small_config: MakeConfig) -> None:
    kept = weights(run)
    name = next(name for name in kept["average"] if "lora_B" in name)
    assert not torch.equal(kept["average"][name], kept["policy"][name])
    exported = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    key = f"unet.{name.replace('.loopfast', '')}"
    torch.testing.assert_close(exported[key], kept["average"][name])

    plain = train(small_config(*PLAIN), display=Display.silent())
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, plain))
    # the same training; other images of it are measured
    assert [line.get("reward_mean") for line in ours] == [line.get("reward_mean") for line in theirs]
    assert ours[-1]["eval_reward"] != theirs[-1]["eval_reward"]


def test_a_resumed_run_has_the_same_average(run: Path, small_config: MakeConfig, tmp_path: Path) -> None:
    half = Path(shutil.copytree(run, tmp_path / "small"))
    shutil.rmtree(half / "checkpoints" / "iteration-000002")
    again = train(small_config(*EMA), resume="auto", display=Display.silent())
    for name, value in weights(run)["average"].items():
        assert torch.equal(weights(again)["average"][name], value)
    with pytest.raises(ConfigError, match=r"cannot resume .*train\.ema_decay"):
        train(small_config(*PLAIN), resume="auto", display=Display.silent())


def test_it_is_not_for_weights_in_parts() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.ema_decay: found 0\.9, allowed: null with distributed\.zero"
    ):
        parse_config("{model: {pretrained: embedded}, train: {ema_decay: 0.9}, distributed: {zero_stage: 2}}")
