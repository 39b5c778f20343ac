from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPVisionModelWithProjection

from loopfast.errors import ConfigError
from loopfast.rewards.models.weights import Source


def weights(name: object) -> Source:
    return Source("r", "weights", str(name))


def head(name: object) -> Source:
    return Source("r", "head", str(name))


def test_a_model_is_loaded_for_scoring_only(clip_folder: Path) -> None:
    model = weights(clip_folder).load_model(CLIPModel)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    vision = weights(clip_folder).load_model(CLIPVisionModelWithProjection)
    assert torch.equal(vision.visual_projection.weight, model.visual_projection.weight)


def test_another_model_is_not_filled_up_with_random_weights(clip_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path / name)
    state = CLIPModel.from_pretrained(clip_folder).state_dict()
    expected = "weights .* is no CLIPModel: without logit_scale, text_projection.weight"
    kept = {k: v for k, v in state.items() if k not in ("logit_scale", "text_projection.weight")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=expected):
        weights(tmp_path).load_model(CLIPModel)
    save_file({**state, "text_projection.weight": torch.ones(3, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"text_projection.weight: found .*shape.*, expected \[24, 32\]"):
        weights(tmp_path).load_model(CLIPModel)


def test_pickled_weights_are_not_read(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copy(clip_folder / "config.json", tmp_path / "config.json")
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot load a CLIPModel with safetensors weights: .*safetensors"):
        weights(tmp_path).load_model(CLIPModel)


def test_what_is_not_on_the_hub_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants
    from transformers import CLIPConfig

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    calls = {
        "weights 'loopfast/absent': cannot load a CLIPModel": lambda: weights("loopfast/absent").load_model(
            CLIPModel
        ),
        "cannot load the configuration of 'loopfast/absent'": lambda: weights("loopfast/absent").load_config(
            CLIPConfig
        ),
        "cannot load the tokenizer of 'loopfast/absent'": lambda: weights("loopfast/absent").load_tokenizer(),
        "head 'loopfast/absent/head.pth' cannot be read": lambda: head(
            "loopfast/absent/head.pth"
        ).read_state(),
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
    found = head(tmp_path / "weights.pt").read_state()
    save_file(state, tmp_path / "weights.safetensors")
    for name, value in state.items():
        assert torch.equal(found[name], value)
        assert torch.equal(head(tmp_path / "weights.safetensors").read_state()[name], value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"head '.*weights.pt' is no file of weights"):
        head(tmp_path / "weights.pt").read_state()
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
            head(tmp_path / name).read_state()
        assert f"reward 'r': head {str(tmp_path / name)!r}" in str(caught.value)


def test_a_state_must_be_the_modules_own() -> None:
    module = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    loaded = head("f.pth").fill(module, good)
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
            head("f.pth").fill(nn.Linear(2, 3), state)
        assert reason in str(caught.value)
