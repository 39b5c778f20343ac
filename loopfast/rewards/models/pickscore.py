"""PickScore: human preference between images of a prompt (Kirstain et al., arXiv 2305.01569)."""

from __future__ import annotations

from loopfast.rewards.base import Reward
from loopfast.rewards.models.clip_score import clip_similarity
from loopfast.rewards.models.pretrained import PretrainedReward, ScoreBatch, number, placement
from loopfast.rewards.models.sources import require_folder
from loopfast.rewards.models.weights import load_pretrained

__all__ = ["pickscore"]


def pickscore(
    weights: str = "yuvalkirstain/PickScore_v1",
    processor: str | None = None,
    scale: float = 1.0,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int = 8,
) -> Reward:
    """PickScore: cosine similarity of image and prompt times the model's logit scale, and times scale.

    Args:
        weights: CLIP ViT-H/14 trained on Pick-a-Pic, a folder or a hub name.
        processor: tokenizer and image processor of the model, a folder or a hub name; the model's card takes
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K; null takes those that come with the weights.
        scale: a further factor; Flow-GRPO divides by 26, which is 0.03846.
        revision: branch, tag or commit of the weights on the hub.
        device: auto (cuda if available, else cpu), cpu, cuda or cuda:N.
        dtype: float32, float16 or bfloat16.
        batch_size: images per model call.
    """
    place = placement("pickscore", device, dtype, batch_size)
    weights = require_folder("pickscore", "weights", weights)
    if processor is not None:
        processor = require_folder("pickscore", "processor", processor, "preprocessor_config.json")
    factor = number("pickscore", "scale", scale)

    def load() -> ScoreBatch:
        from transformers import CLIPModel

        model = load_pretrained("pickscore", CLIPModel, weights, revision=revision)
        # read before the model gets another type, which would round it
        logit_scale = model.logit_scale.float().exp().item()
        return clip_similarity(
            place,
            model,
            processor or weights,
            factor * logit_scale,
            revision=None if processor else revision,
        )

    return PretrainedReward(place, load)
