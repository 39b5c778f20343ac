"""Agreement of images and texts by a model of the CLIP family."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from loopfast.rewards.models.preprocessing import load_preprocessing
from loopfast.rewards.models.pretrained import Placement, ScoreBatch
from loopfast.rewards.models.weights import load_tokenizer
from loopfast.system.memory import to_device

__all__ = ["clip_similarity"]


def clip_similarity(
    place: Placement, model: Any, processor: str, scale: float, *, revision: str | None = None
) -> ScoreBatch:
    """Makes the function that scores images by their cosine similarity with their prompts.

    Args:
        place: device and type of the model, which is moved there.
        model: a ``CLIPModel`` of transformers, with its weights.
        processor: folder or hub name of its tokenizer and image processor.
        scale: factor of the similarity.
        revision: branch, tag or commit of ``processor`` on the hub.

    Returns:
        A function that returns float32 ``[B]`` in [-1, 1] times ``scale``. It cuts off the end of long prompts.

    Raises:
        ConfigError: the tokenizer or the image processor cannot be loaded.
    """
    preprocess = load_preprocessing(place.reward, processor, revision=revision)
    tokenizer = load_tokenizer(place.reward, processor, revision=revision)
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
