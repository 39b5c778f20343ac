"""`vqa_score` on small models with random weights: the answer's probability as transformers' own loss gives it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError
from loopfast.rewards import build_rewards

QUERIES = 3
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QUESTION = 'Does this figure show "{text}"? Please answer yes or no.'
WORDS = [
    *(
        "yes",
        "Yes",
        "no",
        "Question",
        ":",
        "Does",
        "this",
        "figure",
        "show",
        '"',
        '"?',
        "?",
        "Please",
        "answer",
    ),
    *(
        "or",
        ".",
        "a",
        "red",
        "green",
        "blue",
        "circle",
        "star",
        "squares",
        "two",
        "above",
        "and",
        "USER",
        "!",
    ),
]

Score = Callable[..., Tensor]


def word_tokenizer(*, end: bool) -> Any:
    """A token for each word; with the end of the sequence after each text, as T5's, or without."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
    )


def save_blip(folder: Path, *, instruct: bool, **text_config: Any) -> None:
    """InstructBLIP or BLIP-2 with a small T5, or with the language model that ``text_config`` names."""
    from transformers import (
        BertTokenizer,
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    images = BlipImageProcessor(size={"height": 32, "width": 32})
    tokenizer = word_tokenizer(end=True)
    if instruct:
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        bert = BertTokenizer(str(folder / "vocab.txt"))
        processor = InstructBlipProcessor(images, tokenizer, bert, num_query_tokens=QUERIES)
    else:
        processor = Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)
    processor.save_pretrained(folder)
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    config = (InstructBlipConfig if instruct else Blip2Config)(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8, "initializer_range": 0.4},
        qformer_config={
            **SMALL,
            "encoder_hidden_size": 32,
            "vocab_size": 64,
            "cross_attention_frequency": 1,
            "initializer_range": 0.4,
        },
        text_config={
            "model_type": "t5",
            "vocab_size": 64,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **t5,
            **text_config,
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(5)
    cls = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
    model = cls(config)
    with torch.no_grad():
        model.language_projection.weight.mul_(20)  # so that what is seen matters
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def instructblip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructblip")
    save_blip(folder, instruct=True)
    return folder


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip2")
    save_blip(folder, instruct=False)
    return folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA with a chat template."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = word_tokenizer(end=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} !{% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=32, patch_size=8, initializer_range=0.4),
        text_config=LlamaConfig(**SMALL, vocab_size=64, initializer_range=0.4),
        image_token_index=image_token,
        vision_feature_layer=-1,
    )
    torch.manual_seed(6)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["instructblip_folder", "blip2_folder"])
def test_encoder_decoders_give_the_exponential_of_their_own_loss(
    kind: str,
    request: pytest.FixtureRequest,
    images: Tensor,
    prompts: list[str],
    score: Score,
    as_pictures: Callable[[Tensor], list[Any]],
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = request.getfixturevalue(kind)
    found = score("vqa_score", images, prompts, weights=str(folder))
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    labels = processor.tokenizer("yes", return_tensors="pt").input_ids
    assert labels.tolist()[0][-1] == processor.tokenizer.eos_token_id
    for value, picture, prompt in zip(found.tolist(), as_pictures(images), prompts, strict=True):
        question = "Question: " + QUESTION.replace("{text}", prompt)
        inputs = processor(images=picture, text=question, return_tensors="pt")
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss
        assert value == pytest.approx(math.exp(-float(loss)), abs=1e-5)
    assert found.std() > 0.01 * found.mean()


def test_chat_models_give_the_probability_of_the_reply(
    chat_folder: Path,
    images: Tensor,
    prompts: list[str],
    score: Score,
    as_pictures: Callable[[Tensor], list[Any]],
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    found = score("vqa_score", images, prompts, weights=str(chat_folder))
    processor = AutoProcessor.from_pretrained(chat_folder)
    model = AutoModelForImageTextToText.from_pretrained(chat_folder).eval()
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    for value, picture, prompt in zip(found.tolist(), as_pictures(images), prompts, strict=True):
        text = f"USER: <image>{QUESTION.replace('{text}', prompt)} !"
        inputs = processor(images=picture, text=text, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # of transformers 4 only, and not used by the model
        with torch.no_grad():
            reply = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        assert value == pytest.approx(float(reply.scores[0][0].softmax(-1)[yes]), abs=1e-5)
    assert found.std() > 0.01 * found.mean()


@pytest.mark.parametrize("kind", ["instructblip_folder", "chat_folder"])
def test_batches_and_order_change_no_score(
    kind: str, request: pytest.FixtureRequest, images: Tensor, prompts: list[str], score: Score
) -> None:
    weights = str(request.getfixturevalue(kind))
    together = score("vqa_score", images, prompts, weights=weights, batch_size=5)
    apart = score("vqa_score", images, prompts, weights=weights, batch_size=1)
    order = [3, 1, 4, 0, 2]
    moved = score("vqa_score", images[order], [prompts[row] for row in order], weights=weights, batch_size=2)
    assert torch.allclose(apart, together, atol=1e-5)
    assert torch.allclose(moved, together[order], atol=1e-5)


def test_question_and_answer_are_options(
    instructblip_folder: Path, images: Tensor, prompts: list[str], score: Score
) -> None:
    weights = str(instructblip_folder)
    default = score("vqa_score", images, prompts, weights=weights)
    spelled = score(
        "vqa_score", images, prompts, weights=weights, question=f"Question: {QUESTION}", answer="yes"
    )
    torch.testing.assert_close(spelled, default, rtol=1e-4, atol=0)
    for other in ({"question": "{text} ?"}, {"answer": "no"}):
        found = score("vqa_score", images, prompts, weights=weights, **other)
        assert not torch.isclose(found, default, rtol=1e-3).any()


def test_bfloat16_scores_are_close(
    instructblip_folder: Path, images: Tensor, prompts: list[str], score: Score
) -> None:
    weights = str(instructblip_folder)
    exact = score("vqa_score", images[:2], prompts[:2], weights=weights)
    rounded = score("vqa_score", images[:2], prompts[:2], weights=weights, dtype="bfloat16", batch_size=2)
    assert torch.allclose(rounded, exact, rtol=0.2, atol=1e-3)
    assert not torch.equal(rounded, exact)


def test_a_question_without_a_place_for_the_prompt_is_reported(instructblip_folder: Path) -> None:
    options = {"weights": str(instructblip_folder), "question": "Is it nice?"}
    with pytest.raises(ConfigError, match=r"question: found 'Is it nice\?', expected: a text with {text}"):
        build_rewards([RewardConfig(name="vqa_score", options=options)])


def test_models_that_cannot_answer_are_reported(
    chat_folder: Path, clip_folder: Path, bert_tokenizer_folder: Path, tmp_path: Path
) -> None:
    def build(folder: Path, **options: Any) -> None:
        build_rewards([RewardConfig(name="vqa_score", options={"weights": str(folder), **options})])

    with pytest.raises(
        ConfigError, match="clip without a chat template; allowed: instructblip, blip-2 or chat"
    ):
        build(clip_folder)
    with pytest.raises(ConfigError, match="the answer 'Yes !' is 2 of its tokens, expected: 1"):
        build(chat_folder, answer="Yes !")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build(bert_tokenizer_folder)
    save_blip(
        tmp_path,
        instruct=False,
        model_type="opt",
        hidden_size=32,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ConfigError, match="found a blip-2 with 'opt', expected: one with an encoder-decoder"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("tokenizer*", "vocab*", "special*"), "tokenizer"),
        (("qformer_tokenizer",), "qformer_tokenizer"),
    ],
)
def test_missing_files_of_a_tokenizer_are_reported(
    files: tuple[str, ...], message: str, instructblip_folder: Path, tmp_path: Path
) -> None:
    """transformers puts an empty tokenizer, or another one, in the place of one that is missing."""
    folder = tmp_path / "model"
    shutil.copytree(instructblip_folder, folder, ignore=shutil.ignore_patterns(*files))
    with pytest.raises(ConfigError, match=rf"reward 'vqa_score': .*(cannot load|{message})"):
        build_rewards([RewardConfig(name="vqa_score", options={"weights": str(folder)})])


def test_an_answer_that_is_no_token_is_reported(instructblip_folder: Path, chat_folder: Path) -> None:
    for folder in (instructblip_folder, chat_folder):
        with pytest.raises(ConfigError, match="tokenizer does not know the answer 'maybe'"):
            build_rewards(
                [RewardConfig(name="vqa_score", options={"weights": str(folder), "answer": "maybe"})]
            )
