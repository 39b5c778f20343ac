from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.models.pretrained import (
    Placement,
    PretrainedReward,
    ScoreBatch,
    number,
    placement,
    pretrained,
)

CPU = torch.device("cpu")


class Brightness:
    """Loads what scores images by their mean, and keeps the shapes of the calls."""

    def __init__(self) -> None:
        self.loads = 0
        self.calls: list[tuple[int, list[str], list[dict[str, Any]]]] = []

    def load(self) -> Any:
        self.loads += 1
        return self.score

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.calls.append((len(images), prompts, metadata))
        return images.mean((1, 2, 3)).half()


def test_calls_have_one_size_and_scores_their_order() -> None:
    inner = Brightness()
    reward = PretrainedReward(Placement("bright", CPU, torch.float32, 2), inner.load)
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    prompts = [f"prompt {index}" for index in range(5)]
    scores = reward(images, prompts, [{"row": index} for index in range(5)])
    assert scores.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert scores.dtype == torch.float32
    assert inner.calls == [
        (2, ["prompt 0", "prompt 1"], [{"row": 0}, {"row": 1}]),
        (2, ["prompt 2", "prompt 3"], [{"row": 2}, {"row": 3}]),
        (2, ["prompt 4", "prompt 4"], [{"row": 4}, {"row": 4}]),
    ]
    assert reward(images[:0], [], []).shape == (0,)


def test_weights_are_read_once_whatever_comes_first() -> None:
    inner = Brightness()
    reward = PretrainedReward(Placement("bright", CPU, torch.float32, 4), inner.load)
    assert inner.loads == 0
    threads = [threading.Thread(target=reward, args=(torch.rand(1, 3, 4, 4), ["a"], [{}])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reward.load()
    assert inner.loads == 1


def test_placement_takes_what_torch_has() -> None:
    assert placement("r", "cpu", "bfloat16", 3) == Placement("r", CPU, torch.bfloat16, 3)
    automatic = placement("r", "auto", "float32", 1).device.type
    assert automatic == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_is_the_one_that_is_current_when_the_reward_is_made(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    started = False

    def current() -> int:
        assert started, "CUDA was started to know its first device"
        return 3

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "current_device", current)
    assert placement("r", device, "float32", 1).device == torch.device("cuda", 0)
    started = True
    assert placement("r", device, "float32", 1).device == torch.device("cuda", 3)
    assert placement("r", "cuda:1", "float32", 1).device == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("device", "dtype", "batch_size", "reason"),
    [
        ("meta", "float32", 1, "device: found 'meta', allowed: auto, cpu, cuda or cuda:N"),
        ("cuda:x", "float32", 1, "device: found 'cuda:x'"),
        ("cuda:99", "float32", 1, "device: cuda:99 is not there"),
        ("cpu", "float64", 1, "dtype: found 'float64', allowed: float32, float16, bfloat16"),
        ("cpu", "float32", 0, "batch_size: found 0, allowed: a whole number, at least 1"),
        ("cpu", "float32", True, "batch_size: found True"),
        ("cpu", "float32", 1.5, "batch_size: found 1.5"),
    ],
)
def test_placement_refuses_by_name(device: str, dtype: str, batch_size: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        placement("pickscore", device, dtype, batch_size)
    assert str(caught.value).startswith("reward 'pickscore': ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("value", [True, "2", float("nan"), float("inf"), None])
def test_a_number_is_finite(value: Any) -> None:
    assert number("r", "scale", 2) == 2.0
    with pytest.raises(ConfigError, match=r"reward 'r': scale: found .*, allowed: a finite number"):
        number("r", "scale", value)


def test_a_decorated_function_has_the_common_options_too() -> None:
    inner = Brightness()

    @pretrained
    def bright(place: Placement, scale: float = 1.0) -> Callable[[], ScoreBatch]:
        number(place.reward, "scale", scale)
        return inner.load

    assert list(inspect.signature(bright).parameters) == ["scale", "device", "dtype", "batch_size"]
    reward = bright(scale=2.0, device="cpu", batch_size=3)
    assert reward.place == Placement("bright", CPU, torch.float32, 3)
    assert inner.loads == 0
    assert reward(torch.ones(1, 3, 4, 4), ["a"], [{}]).tolist() == [1.0]
    with pytest.raises(ConfigError, match="reward 'bright': dtype: found 'int8'"):
        bright(dtype="int8")
    with pytest.raises(TypeError, match=r"bright\(\) got an unexpected keyword argument 'size'"):
        bright(size=1)
