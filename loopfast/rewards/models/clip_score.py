"""CLIP score: the agreement of an image with its prompt (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from loopfast.rewards.models.preprocessing import load_preprocessing
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, number, pretrained
from loopfast.rewards.models.weights import Source, require_folder
from loopfast.system.memory import to_device

__all__ = ["clip_score", "clip_similarity"]


@pretrained
def clip_score(
    place: Placement,
    weights: str = "openai/clip-vit-large-patch14",
    scale: float = 1.0,
    revision: str | None = None,
) -> Callable[[], ScoreBatch]:
    """The cosine similarity of image and prompt, in [-1, 1] times scale.

    Args:
        weights: any CLIP model of transformers, a folder or a hub name.
        scale: factor of the similarity; torchmetrics takes 100, the paper 2.5 and 0 for what is below.
    """
    source = require_folder(place.reward, "weights", weights, revision)
    factor = number(place.reward, "scale", scale)

    def load() -> ScoreBatch:
        from transformers import CLIPModel

        return clip_similarity(place, source.load_model(CLIPModel), source, factor)

    return load


def clip_similarity(place: Placement, model: Any, processor: Source, scale: float) -> ScoreBatch:
    """Makes the function that scores images by their similarity with their prompts, whose ends it cuts off if long.

    Args:
        place, model: a ``CLIPModel`` of transformers, and the device and type it gets.
        processor: source of its tokenizer and image processor.
        scale: factor of the cosine similarity.

    Raises:
        ConfigError: the tokenizer or the image processor cannot be loaded.
    """
    preprocess = load_preprocessing(processor)
    tokenizer = processor.load_tokenizer()
    length = model.config.text_config.max_position_embeddings
    model.to(device=place.device, dtype=place.dtype)

    def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        found = model(
            input_ids=to_device(tokens["input_ids"], place.device),
            attention_mask=to_device(tokens["attention_mask"], place.device),
            pixel_values=preprocess(images).to(place.dtype),
        )
        return scale * cosine_similarity(found.image_embeds.float(), found.text_embeds.float())

    return score
