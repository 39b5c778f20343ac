"""PickScore: which of two images of a prompt people prefer (Kirstain et al., arXiv 2305.01569)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loopfast.rewards.base import Reward
from loopfast.rewards.models.clip import clip_similarity
from loopfast.rewards.models.pretrained import (
    PretrainedReward,
    ScoreBatch,
    load_pretrained,
    number,
    placement,
    require_folder,
)

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
        processor: its tokenizer and image processor, a folder or a hub name; null: those that come with the weights;
            the model's card takes laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        scale: a further factor; Flow-GRPO divides by 26, which is 0.03846.
        revision: of the weights on the hub.
        device: auto (cuda where there is one, else cpu), cpu, cuda or cuda:N.
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
        # before the model is given another type, which would round it
        factors = factor * model.logit_scale.float().exp().item()
        similarity = clip_similarity(
            place, model, processor or weights, revision=None if processor else revision
        )

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            return factors * similarity(images, prompts)

        return score

    return PretrainedReward(place, load)
