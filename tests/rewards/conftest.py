"""Small models of the right architectures with random weights, saved in the format of the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast.config import RewardConfig
from loopfast.rewards import build_rewards

PROMPTS = [
    "a red circle",
    "two blue squares",
    "a green star above a circle",
    "a red star and a blue circle",
    "a circle",
]
# standard deviation of the random weights: large, so that scores differ
SPREAD = 0.3

Score = Callable[..., Tensor]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return list(PROMPTS)


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Five different images, float32 ``[5, 3, 40, 48]``: larger than the models' inputs, and not square."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(5, 3, 5, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, (40, 48), mode="bilinear")


@pytest.fixture(scope="session")
def exact_images(images: Tensor) -> Tensor:
    """The same images in the models' size and in 8 bits, float32 ``[5, 3, 32, 32]``: only to be normalized."""
    return (images[..., :32, :32] * 255).round() / 255


@pytest.fixture(scope="session")
def as_pictures() -> Callable[[Tensor], list[Any]]:
    """Returns the images as PIL's, the input of an image processor."""
    from PIL import Image

    def convert(images: Tensor) -> list[Any]:
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(picture.numpy()) for picture in pixels]

    return convert


@pytest.fixture(scope="session")
def score() -> Score:
    """``score(name, images, prompts, **options)`` scores with one reward with weights, from a configuration, on the
    CPU.
    """

    def call(name: str, images: Tensor, prompts: list[str], **options: Any) -> Tensor:
        term = RewardConfig(name=name, options={"device": "cpu", **options})
        return build_rewards([term]).score(images, prompts).parts[name]

    return call


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model for images of 32 x 32, with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from benchmarks.embedded_model.tokenizer import END, MAX_LENGTH, START, write_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = write_tokenizer(folder)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **small,
                "vocab_size": len(vocabulary),
                "max_position_embeddings": MAX_LENGTH,
                "bos_token_id": vocabulary[START],
                "eos_token_id": vocabulary[END],
                "pad_token_id": vocabulary[END],
                "projection_dim": 24,
            },
            vision_config={
                **small,
                "image_size": 32,
                "patch_size": 8,
                "projection_dim": 24,
            },
            projection_dim=24,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            # around their initial values, so that norms scale and biases shift
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=start, std=SPREAD)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def bert_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's tokenizer for the words of the prompts."""
    folder = tmp_path_factory.mktemp("bert-tokenizer")
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
