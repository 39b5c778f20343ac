"""PickScore: human preference between images of a prompt (Kirstain et al., arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Callable

from loopfast.rewards.models.clip_score import clip_similarity
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, number, pretrained
from loopfast.rewards.models.weights import require_folder

__all__ = ["pickscore"]


@pretrained
def pickscore(
    place: Placement,
    weights: str = "yuvalkirstain/PickScore_v1",
    processor: str | None = None,
    scale: float = 1.0,
    revision: str | None = None,
) -> Callable[[], ScoreBatch]:
    """PickScore: cosine similarity of image and prompt times the model's logit scale, and times scale.

    Args:
        weights: CLIP ViT-H/14 trained on Pick-a-Pic, a folder or a hub name.
        processor: tokenizer and image processor of the model, a folder or a hub name; the model's card takes
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K; null takes those that come with the weights.
        scale: a further factor; Flow-GRPO divides by 26, which is 0.03846.
    """
    source = words = require_folder(place.reward, "weights", weights, revision)
    if processor is not None:
        words = require_folder(place.reward, "processor", processor, files=["preprocessor_config.json"])
    factor = number(place.reward, "scale", scale)

    def load() -> ScoreBatch:
        from transformers import CLIPModel

        model = source.load_model(CLIPModel)
        # read before the model gets another type, which would round it
        logit_scale = model.logit_scale.float().exp().item()
        return clip_similarity(place, model, words, factor * logit_scale)

    return load
