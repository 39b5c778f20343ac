"""CLIP score: the agreement of an image with its prompt (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from loopfast.rewards.base import Reward
from loopfast.rewards.models.clip import clip_similarity
from loopfast.rewards.models.pretrained import PretrainedReward, ScoreBatch, number, placement
from loopfast.rewards.models.sources import require_folder
from loopfast.rewards.models.weights import load_pretrained

__all__ = ["clip_score"]


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
