"""`blip_vqa` on a small BLIP with random weights: P(yes) as transformers computes it, and what it is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError, RewardError
from loopfast.rewards import build_rewards

WORDS = ("yes", "no", "a", "red", "green", "blue", "circle", "star", "square", "squares", "two", "above", "?")
PROMPTS = [
    "a red circle and a blue star",
    "two blue squares",
    "a green star above a circle",
    "a red star and a blue circle and a green square",
    "a circle",
]
PHRASES = [
    ["a red circle", "a blue star"],
    ["two blue squares"],
    ["a green star", "a circle"],
    ["a red star", "a blue circle", "a green square"],
    ["a circle"],
]

Score = Callable[..., Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor

    folder = tmp_path_factory.mktemp("blip")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    start = 5 + len(WORDS)  # [DEC] and [ENC] follow BERT's tokens, as in the published model
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **small,
            "vocab_size": start + 2,
            "bos_token_id": start,
            "sep_token_id": 3,
            "max_position_embeddings": 40,
            "encoder_hidden_size": 32,
            "initializer_range": 0.4,
        },
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.4},
    )
    torch.manual_seed(3)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    return folder


def probability_of_yes(folder: Path, pictures: list[Any], questions: list[str]) -> list[float]:
    """One question at a time through transformers' whole model: the decoder's first distribution, of yes and no."""
    from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessor

    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = BlipImageProcessor.from_pretrained(folder)
    start = model.config.text_config.bos_token_id
    logits: list[Tensor] = []
    model.text_decoder.register_forward_hook(lambda _, __, output: logits.append(output.logits))
    for picture, question in zip(pictures, questions, strict=True):
        ids = tokenizer(question, return_tensors="pt").input_ids
        ids[0, 0] = start + 1
        with torch.no_grad():
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=processor(picture, return_tensors="pt").pixel_values,
                decoder_input_ids=torch.tensor([[start]]),
            )
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    probabilities = [found[0, 0].softmax(-1) for found in logits]
    return [float(each[yes] / (each[yes] + each[no])) for each in probabilities]


def test_the_score_is_the_product_of_the_yes_probabilities(
    folder: Path, score: Score, as_pictures: Callable[[Tensor], list[Any]]
) -> None:
    # of the model's own size: resizing rounds otherwise than transformers
    images = (torch.rand(5, 3, 32, 32) * 255).round() / 255
    found = score("blip_vqa", images, PROMPTS, weights=str(folder))
    for value, picture, phrases in zip(found.tolist(), as_pictures(images), PHRASES, strict=True):
        yes = probability_of_yes(folder, [picture] * len(phrases), [f"{phrase}?" for phrase in phrases])
        assert value == pytest.approx(torch.tensor(yes).prod().item(), abs=1e-5)
    assert found.std() > 0.01
    assert ((found > 0) & (found < 1)).all()


def test_batches_and_order_change_no_score(folder: Path, images: Tensor, score: Score) -> None:
    together = score("blip_vqa", images, PROMPTS, weights=str(folder), batch_size=8)
    apart = score("blip_vqa", images, PROMPTS, weights=str(folder), batch_size=2)
    order = [3, 1, 4, 0, 2]
    moved = score(
        "blip_vqa", images[order], [PROMPTS[row] for row in order], weights=str(folder), batch_size=3
    )
    assert torch.allclose(apart, together, atol=1e-5)
    assert torch.allclose(moved, together[order], atol=1e-5)


def test_bfloat16_scores_are_close(folder: Path, images: Tensor, score: Score) -> None:
    exact = score("blip_vqa", images[:2], PROMPTS[:2], weights=str(folder))
    rounded = score("blip_vqa", images[:2], PROMPTS[:2], weights=str(folder), dtype="bfloat16", batch_size=2)
    assert torch.allclose(rounded, exact, atol=0.1)
    assert not torch.equal(rounded, exact)


def test_metadata_can_name_the_phrases(folder: Path, images: Tensor) -> None:
    rewards = build_rewards(
        [RewardConfig(name="blip_vqa", options={"weights": str(folder), "device": "cpu"})]
    )
    prompts = ["anything at all", "red square and blue star", "a circle"]
    metadata = [{"phrases": PHRASES[0]}, {"phrases": ("a red square",)}, {"phrases": []}]
    given = rewards.score(images[:3], prompts, metadata).total
    same = rewards.score(images[:3], ["a red circle and a blue star", "a red square", "a circle"]).total
    assert torch.allclose(given, same, atol=1e-5)


@pytest.mark.parametrize("phrases", ["a cat", [3], [""], 7])
def test_phrases_of_another_kind_name_the_prompt(folder: Path, images: Tensor, phrases: Any) -> None:
    rewards = build_rewards(
        [RewardConfig(name="blip_vqa", options={"weights": str(folder), "device": "cpu"})]
    )
    with pytest.raises(RewardError, match=r"prompt 'a circle': metadata phrases: .* a list of texts"):
        rewards.score(images[:1], ["a circle"], [{"phrases": phrases}])


def test_a_prompt_without_phrases_is_the_question(folder: Path, images: Tensor, score: Score) -> None:
    from loopfast.rewards.models.noun_phrases import rule_phrases

    assert rule_phrases("above two") == []
    rewards = build_rewards(
        [RewardConfig(name="blip_vqa", options={"weights": str(folder), "device": "cpu"})]
    )
    whole = rewards.score(images[:1], ["x"], [{"phrases": ["above two"]}]).total
    found = score("blip_vqa", images[:1], ["above two"], weights=str(folder))
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_long_question_is_cut_and_punctuation_left_out(folder: Path, images: Tensor) -> None:
    rewards = build_rewards(
        [RewardConfig(name="blip_vqa", options={"weights": str(folder), "device": "cpu"})]
    )
    long = " ".join(["red star"] * 40)
    found = rewards.score(
        images[[0, 0, 1, 1]],
        ["x"] * 4,
        [{"phrases": [phrase]} for phrase in (long, f"{long} red", "a red star", 'A "red" star.')],
    ).total
    # rows of a call may be rounded differently
    torch.testing.assert_close(found[::2], found[1::2], atol=1e-5, rtol=0)
    assert (found[0] - found[2]).abs() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": "nltk"}, "phrases: found 'nltk', allowed: rules, spacy"),
        ({"weights": "./nowhere"}, "weights: './nowhere' is not there"),
        ({"dtype": "int8"}, "dtype: found 'int8'"),
    ],
)
def test_wrong_options_are_reported(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_rewards([RewardConfig(name="blip_vqa", options={"weights": str(folder), **options})])


def test_another_model_and_another_vocabulary_are_reported(
    folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"reward 'blip_vqa': weights .*expected \[1, 1, 32\]"):
        build_rewards([RewardConfig(name="blip_vqa", options={"weights": str(clip_folder)})])
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for file in (other / "vocab.txt", other / "tokenizer.json"):
        if file.exists():
            file.write_text(file.read_text().replace("\nno\n", "\nnay\n").replace('"no"', '"nay"'))
    with pytest.raises(ConfigError, match="no token 'no' in the vocabulary"):
        build_rewards([RewardConfig(name="blip_vqa", options={"weights": str(other), "device": "cpu"})])
