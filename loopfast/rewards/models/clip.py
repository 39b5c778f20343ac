"""Agreement of images and texts by a model of the CLIP family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from loopfast.rewards.models.preprocessing import load_preprocessing
from loopfast.rewards.models.pretrained import Placement, load_tokenizer
from loopfast.system.memory import to_device

__all__ = ["clip_similarity"]


def clip_similarity(
    place: Placement, model: Any, processor: str, *, revision: str | None = None
) -> Callable[[Tensor, list[str]], Tensor]:
    """The cosine similarity of each image and its text.

    Args:
        place: where and how the model computes; it is moved there.
        model: a ``CLIPModel`` of transformers, with its weights.
        processor: folder or hub name of its tokenizer and image processor.
        revision: of ``processor`` on the hub.

    Returns:
        A function of images float32 ``[B, 3, H, W]`` in [0, 1] and B texts, longer ones cut, which gives float32
        ``[B]`` in [-1, 1].

    Raises:
        ConfigError: the tokenizer or the image processor cannot be loaded.
    """
    preprocess = load_preprocessing(place.reward, processor, revision=revision)
    tokenizer = load_tokenizer(place.reward, processor, revision=revision)
    length = model.config.text_config.max_position_embeddings
    model.to(device=place.device, dtype=place.dtype)

    def similarity(images: Tensor, texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        found = model(
            input_ids=to_device(tokens["input_ids"], place.device),
            attention_mask=to_device(tokens["attention_mask"], place.device),
            pixel_values=preprocess(images).to(place.dtype),
        )
        return cosine_similarity(found.image_embeds.float(), found.text_embeds.float())

    return similarity
