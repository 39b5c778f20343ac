"""The number of tokens of a prompt that each family's text encoders read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.embedded_model.tokenizer import MAX_LENGTH
from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.policies import TextLimit, load_policy, local_text_limits, read_prompts
from tests.families import settings_of

CLIP = ("CLIP", MAX_LENGTH)
WORDS = ["red", "circle", "and", "blue", "square"] * 6


def model(pretrained: Path | str, **options: Any) -> ModelConfig:
    return ModelConfig(pretrained=str(pretrained), device="cpu", tune="lora", **options)


def named(limits: tuple[TextLimit, ...] | None) -> list[tuple[str, int]]:
    assert limits is not None
    return [(limit.encoder, limit.tokens) for limit in limits]


def content(limit: TextLimit) -> int:
    """Tokens that a text encoder reads beside the marks of beginning and end."""
    return limit.tokens - limit.tokenizer.num_special_tokens_to_add(pair=False)


@pytest.mark.parametrize(
    ("family", "options", "limits"),
    [
        ("sd", {}, [CLIP]),
        ("sdxl", {}, [CLIP]),
        ("sd3", {"max_sequence_length": 12}, [CLIP, ("T5", 12)]),
        ("flux", {"max_sequence_length": 20}, [CLIP, ("T5", 20)]),
        ("pixart", {"max_sequence_length": 12}, [("T5", 12)]),
    ],
)
def test_the_model_reads_so_much_and_no_more(
    family: str, options: dict[str, int], limits: list[tuple[str, int]], family_folder: Any
) -> None:
    config = model(family_folder(family), **{**settings_of(family), **options})
    policy = load_policy(config)
    assert named(policy.text_limits) == named(local_text_limits(config)) == limits

    longest = max(map(content, policy.text_limits))
    read = " ".join(WORDS[:longest])
    prompts = [read, f"{read} green", " ".join([*WORDS[: longest - 1], "green"]), "red"]
    rows = policy.encode(prompts)
    assert all(torch.equal(value[0], value[1]) for value in rows.values())
    assert not all(torch.equal(value[0], value[2]) for value in rows.values())

    reading = read_prompts(policy.text_limits, prompts)
    assert reading.count == 4
    assert reading.twins == {1: 0}
    assert [(cut.index, cut.limit.encoder) for cut in reading.cuts] == [
        (index, limit.encoder)
        for limit in policy.text_limits
        for index, words in enumerate((longest, longest + 1, longest))
        if words > content(limit)
    ]
    for cut in reading.cuts:
        last = WORDS[content(cut.limit) - 5 : content(cut.limit)]
        assert cut.end == f"… {' '.join(last)}"
        assert cut.tokens == len(cut.limit.ids([prompts[cut.index]], cut=False)[0]) > cut.limit.tokens


def test_pixart_reads_small_letters(family_folder: Any) -> None:
    policy = load_policy(model(family_folder("pixart"), **settings_of("pixart")))
    [limit] = policy.text_limits
    prompts = ["A RED Circle", "a red circle"]
    rows = policy.encode(prompts)
    assert torch.equal(*rows["encoder_hidden_states"])
    first, second = limit.ids(prompts, cut=False)
    assert first == second


def test_prompts_that_differ_in_what_is_not_tokenized_are_no_twins(family_folder: Any) -> None:
    limits = local_text_limits(model(family_folder("sd")))
    assert limits is not None
    long = " ".join(WORDS)
    assert read_prompts(limits, [long, long.upper(), long, "red", "RED"]).twins == {}


@pytest.mark.parametrize("prompts", [[], ["red"], ["red", "red"]])
def test_short_prompts_need_no_warning(prompts: list[str], family_folder: Any) -> None:
    limits = local_text_limits(model(family_folder("sd3")))
    assert limits is not None
    assert read_prompts(limits, prompts).warning is None


def test_each_encoder_that_cuts_is_named(family_folder: Any) -> None:
    limits = local_text_limits(model(family_folder("sd3"), max_sequence_length=12))
    assert limits is not None
    prompts = [" ".join(WORDS[:12]), " ".join(WORDS[:15]), "red"]
    assert read_prompts(limits, prompts).warning == (
        "2 of 3 are longer than a text encoder reads and cut (CLIP at 16 tokens: 1, T5 at 12 tokens: 2), the first "
        "after '… square red circle and blue'"
    )


def edited(folder: Path, place: Path, **index: Any) -> Path:
    """The pipeline without its weights, and with another ``model_index.json``."""
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    file = place / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **index}))
    return place


@pytest.mark.parametrize(
    ("family", "index", "limits"),
    [
        ("sd3", {}, [CLIP, ("T5", 256)]),
        ("sd3", {"tokenizer_3": [None, None], "text_encoder_3": [None, None]}, [CLIP]),
        ("sd3", {"text_encoder_3": [None, None]}, [CLIP]),
        ("flux", {}, [CLIP, ("T5", 512)]),
        ("pixart", {}, [("T5", 300)]),
        ("pixart", {"_class_name": "PixArtAlphaPipeline"}, [("T5", 120)]),
    ],
)
def test_limits_are_known_without_weights(
    family: str, index: dict[str, Any], limits: list[tuple[str, int]], family_folder: Any, tmp_path: Path
) -> None:
    place = edited(family_folder(family), tmp_path / "model", **index)
    assert named(local_text_limits(model(place))) == limits


def test_limits_of_a_hub_name_are_those_of_the_cache(
    family_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    edited(family_folder("sd"), repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert named(local_text_limits(model("some/model"))) == [CLIP]
    assert local_text_limits(model("other/model")) is None
    shutil.rmtree(repository / "snapshots" / "abc" / "tokenizer")
    assert local_text_limits(model("some/model")) is None


def test_a_damaged_tokenizer_is_named(family_folder: Any, tmp_path: Path) -> None:
    place = edited(family_folder("sd"), tmp_path / "model")
    for file in (place / "tokenizer").iterdir():
        file.write_text("{")
    with pytest.raises(ConfigError, match=r"model\.pretrained: cannot load the tokenizer of ") as caught:
        local_text_limits(model(place))
    assert "\n" not in str(caught.value)
