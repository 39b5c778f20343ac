"""LAION's aesthetic predictor, version 2: the rating that people would give an image, whatever it shows.

github.com/christophschuhmann/improved-aesthetic-predictor; the reward of DDPO (arXiv 2305.13301, section 5).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from loopfast.rewards.base import Reward
from loopfast.rewards.models.preprocessing import load_preprocessing
from loopfast.rewards.models.pretrained import PretrainedReward, ScoreBatch, placement
from loopfast.rewards.models.sources import require_file, require_folder
from loopfast.rewards.models.weights import load_pretrained, load_state, read_state

__all__ = ["ScoreHead", "aesthetic"]


class ScoreHead(nn.Module):
    """The published multilayer perceptron: linear layers 768, 1024, 128, 64, 16, 1 without activations.

    The layers have their numbers of the published file. Its dropout layers are left out: they act in training only.

    Args:
        width: numbers in an embedding.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        widths = [width, 1024, 128, 64, 16, 1]
        numbers = ("0", "2", "4", "6", "7")
        layers = [nn.Linear(before, after) for before, after in pairwise(widths)]
        self.layers = nn.ModuleDict(dict(zip(numbers, layers, strict=True)))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Returns the scores ``[B]`` of embeddings ``[B, width]``."""
        for layer in self.layers.values():
            embeddings = layer(embeddings)
        return embeddings.squeeze(-1)


def aesthetic(
    weights: str = "openai/clip-vit-large-patch14",
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int = 8,
) -> Reward:
    """LAION's aesthetic score: about 1 to 10, higher is better; the prompt does not matter.

    Args:
        weights: CLIP ViT-L/14, a folder or a hub name.
        head: the published predictor, such as sac+logos+ava1-l14-linearMSE.pth: a .pth or .safetensors file, or
            owner/name/file on the hub.
        revision: branch, tag or commit of the weights on the hub.
        device: auto (cuda if available, else cpu), cpu, cuda or cuda:N.
        dtype: float32, float16 or bfloat16 for CLIP; the head computes in float32.
        batch_size: images per model call.
    """
    place = placement("aesthetic", device, dtype, batch_size)
    weights = require_folder("aesthetic", "weights", weights)
    head = require_file("aesthetic", "head", head)

    def load() -> ScoreBatch:
        from transformers import CLIPVisionModelWithProjection

        clip: Any = load_pretrained("aesthetic", CLIPVisionModelWithProjection, weights, revision=revision)
        preprocess = load_preprocessing("aesthetic", weights, revision=revision)
        layers = load_state(
            "aesthetic",
            "head",
            head,
            ScoreHead(clip.config.projection_dim),
            read_state("aesthetic", "head", head),
        )
        clip.to(device=place.device, dtype=place.dtype)
        layers.to(place.device)

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            found = clip(pixel_values=preprocess(images).to(place.dtype)).image_embeds
            scores: Tensor = layers(normalize(found.float(), dim=-1))
            return scores

        return score

    return PretrainedReward(place, load)
