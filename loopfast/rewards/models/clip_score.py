"""CLIP score: the agreement of an image with its prompt (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from loopfast.rewards.base import Reward
from loopfast.rewards.models.preprocessing import load_preprocessing
from loopfast.rewards.models.pretrained import Placement, PretrainedReward, ScoreBatch, number, placement
from loopfast.rewards.models.sources import require_folder
from loopfast.rewards.models.weights import load_pretrained, load_tokenizer
from loopfast.system.memory import to_device

__all__ = ["clip_score", "clip_similarity"]


def clip_score(
    weights: str = "openai/clip-vit-large-patch14",
    scale: float = 1.0,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int = 8,
) -> Reward:
    """The cosine similarity of image and prompt, in [-1, 1] times scale.

    Args:
        weights: any CLIP model of transformers, a folder or a hub name.
        scale: factor of the similarity; torchmetrics takes 100, the paper 2.5 and 0 for what is below.
        revision: branch, tag or commit of the weights on the hub.
        device: auto (cuda if available, else cpu), cpu, cuda or cuda:N.
        dtype: float32, float16 or bfloat16.
        batch_size: images per model call.
    """
    place = placement("clip_score", device, dtype, batch_size)
    weights = require_folder("clip_score", "weights", weights)
    factor = number("clip_score", "scale", scale)

    def load() -> ScoreBatch:
        from transformers import CLIPModel

        model = load_pretrained("clip_score", CLIPModel, weights, revision=revision)
        return clip_similarity(place, model, weights, factor, revision=revision)

    return PretrainedReward(place, load)


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
