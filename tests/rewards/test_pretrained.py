from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModelWithProjection

from loopfast.errors import ConfigError
from loopfast.rewards.models.pretrained import Placement, PretrainedReward, number, placement
from loopfast.rewards.models.sources import is_file, require_file, require_folder
from loopfast.rewards.models.weights import (
    load_config,
    load_pretrained,
    load_state,
    load_tokenizer,
    read_state,
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


def test_sources_are_local_or_on_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    file.touch()
    assert require_folder("r", "weights", "owner/name") == "owner/name"
    assert require_folder("r", "weights", "name") == "name"
    assert require_file("r", "head", "owner/name/folder/head.pth") == "owner/name/folder/head.pth"
    assert require_file("r", "head", str(file)) == str(file)
    assert is_file(str(file))
    assert is_file("owner/name/file.pt")
    assert is_file("./absent.pt")
    assert not is_file("owner/name")
    assert not is_file(str(tmp_path))


def test_absent_sources_are_named(tmp_path: Path, clip_folder: Path) -> None:
    cases = [
        (require_folder, "./nowhere", "is not there; expected: a folder with a model's files, or a hub name"),
        (require_folder, "a/b/c", "is neither a folder nor a hub name such as owner/name"),
        (require_folder, str(tmp_path), r"no config.json, *.safetensors in this folder"),
        (require_folder, "", "allowed: a folder or a hub name"),
        (require_file, str(clip_folder), "is not there; expected: a file of weights"),
        (require_file, "owner/name", "is no file on the hub, such as owner/name/file"),
        (require_file, None, "allowed: a file, or owner/name/file on the hub"),
    ]
    for check, source, reason in cases:
        with pytest.raises(ConfigError) as caught:
            check("r", "weights", source)  # type: ignore[operator]
        assert str(caught.value).startswith("reward 'r': weights: ")
        assert reason in str(caught.value)


def test_a_model_is_loaded_for_scoring_only(clip_folder: Path) -> None:
    model = load_pretrained("r", CLIPModel, str(clip_folder))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    vision = load_pretrained("r", CLIPVisionModelWithProjection, str(clip_folder))
    assert torch.equal(vision.visual_projection.weight, model.visual_projection.weight)


def test_another_model_is_not_filled_up_with_random_weights(clip_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path / name)
    state = CLIPModel.from_pretrained(clip_folder).state_dict()
    expected = "weights .* is no CLIPModel: without logit_scale, text_projection.weight"
    kept = {k: v for k, v in state.items() if k not in ("logit_scale", "text_projection.weight")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=expected):
        load_pretrained("r", CLIPModel, str(tmp_path))
    save_file({**state, "text_projection.weight": torch.ones(3, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"text_projection.weight: found .*shape.*, expected \[24, 32\]"):
        load_pretrained("r", CLIPModel, str(tmp_path))


def test_pickled_weights_are_not_read(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copy(clip_folder / "config.json", tmp_path / "config.json")
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot load a CLIPModel with safetensors weights: .*safetensors"):
        load_pretrained("r", CLIPModel, str(tmp_path))


def test_what_is_not_on_the_hub_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants
    from transformers import CLIPConfig

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    calls = {
        "weights 'loopfast/absent': cannot load a CLIPModel": lambda: load_pretrained(
            "r", CLIPModel, "loopfast/absent"
        ),
        "cannot load the configuration of 'loopfast/absent'": lambda: load_config(
            "r", CLIPConfig, "loopfast/absent"
        ),
        "cannot load the tokenizer of 'loopfast/absent'": lambda: load_tokenizer("r", "loopfast/absent"),
        "head 'loopfast/absent/head.pth' cannot be read": lambda: read_state(
            "r", "head", "loopfast/absent/head.pth"
        ),
    }
    for reason, call in calls.items():
        with pytest.raises(ConfigError) as caught:
            call()
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_tensors_are_read_from_both_kinds_of_files(tmp_path: Path, wrapper: str | None) -> None:
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pt")
    found = read_state("r", "head", str(tmp_path / "weights.pt"))
    save_file(state, tmp_path / "weights.safetensors")
    for name, value in state.items():
        assert torch.equal(found[name], value)
        assert torch.equal(read_state("r", "head", str(tmp_path / "weights.safetensors"))[name], value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"head '.*weights.pt' is no file of weights"):
        read_state("r", "head", str(tmp_path / "weights.pt"))
    assert not (tmp_path / "executed").exists()


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    contents = {
        "text.pth": b"not weights",
        "empty.pth": b"",
        "pickle.pth": pickle.dumps([1, 2], protocol=2),
        "text.safetensors": b"not weights at all",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"a": 1.0}, tmp_path / "number.pth")
    for name in [*contents, "number.pth"]:
        with pytest.raises(ConfigError) as caught:
            read_state("r", "head", str(tmp_path / name))
        assert f"reward 'r': head {str(tmp_path / name)!r}" in str(caught.value)


def test_a_state_must_be_the_modules_own() -> None:
    module = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    loaded = load_state("r", "head", "f.pth", module, good)
    assert torch.equal(loaded.weight, good["weight"])
    assert not loaded.weight.requires_grad
    reasons = {
        "head 'f.pth' does not hold the weights of Linear: without bias; with gain, which it does not have": {
            "weight": good["weight"],
            "gain": torch.ones(1),
        },
        "head 'f.pth': weight: found shape [3, 4], expected [3, 2]": {**good, "weight": torch.ones(3, 4)},
        "with a, b, c and 2 more": {**good, **{name: torch.ones(1) for name in "abcde"}},
    }
    for reason, state in reasons.items():
        with pytest.raises(ConfigError) as caught:
            load_state("r", "head", "f.pth", nn.Linear(2, 3), state)
        assert reason in str(caught.value)
