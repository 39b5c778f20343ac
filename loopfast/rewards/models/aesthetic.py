"""LAION's aesthetic predictor, version 2: the rating that people would give an image, whatever it shows.

github.com/christophschuhmann/improved-aesthetic-predictor; the reward of DDPO (arXiv 2305.13301, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from loopfast.rewards.models.preprocessing import load_preprocessing
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, pretrained
from loopfast.rewards.models.weights import require_file, require_folder

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


@pretrained
def aesthetic(
    place: Placement,
    weights: str = "openai/clip-vit-large-patch14",
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    revision: str | None = None,
) -> Callable[[], ScoreBatch]:
    """LAION's aesthetic score: about 1 to 10, higher is better; the prompt does not matter.

    Args:
        weights: CLIP ViT-L/14, a folder or a hub name.
        head: the published predictor, such as sac+logos+ava1-l14-linearMSE.pth: a .pth or .safetensors file, or
            owner/name/file on the hub.
        dtype: float32, float16 or bfloat16 for CLIP; the head computes in float32.
    """
    model = require_folder(place.reward, "weights", weights, revision)
    predictor = require_file(place.reward, "head", head)

    def load() -> ScoreBatch:
        from transformers import CLIPVisionModelWithProjection

        clip = model.load_model(CLIPVisionModelWithProjection).to(place.device, place.dtype)
        preprocess = load_preprocessing(model)
        layers = predictor.fill(ScoreHead(clip.config.projection_dim), predictor.read_state())
        layers.to(place.device)

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            found = clip(pixel_values=preprocess(images).to(place.dtype)).image_embeds
            scores: Tensor = layers(normalize(found.float(), dim=-1))
            return scores

        return score

    return load
