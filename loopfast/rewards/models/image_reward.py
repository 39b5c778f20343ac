"""ImageReward: human preference (Xu et al., arXiv 2304.05977; github.com/THUDM/ImageReward).

A BLIP text encoder reads the prompt and attends to BLIP's image tokens. A multilayer perceptron maps its first token to
a number, which is normalized to mean 0 and standard deviation 1 over the authors' data. The published weights have the
names of BLIP's own code; they are read into BLIP of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.models.aesthetic import ScoreHead
from loopfast.rewards.models.preprocessing import OPENAI_MEAN, OPENAI_STD, ImagePreprocessing
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, pretrained
from loopfast.rewards.models.weights import renamed, require_file, require_folder
from loopfast.system.memory import to_device

__all__ = ["from_blip", "image_reward"]

MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
# width of an attention head in all of BLIP's vision transformers and BERT models; the file does not hold it
HEAD_WIDTH = 64

_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"norm\.(\w+)", r"post_layernorm.\1"),
    (r"blocks\.(\d+)\.norm(\d)\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.(\w+)\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
)
_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."


@pretrained
def image_reward(
    place: Placement,
    weights: str = "THUDM/ImageReward/ImageReward.pt",
    tokenizer: str = "google-bert/bert-base-uncased",
    revision: str | None = None,
) -> Callable[[], ScoreBatch]:
    """ImageReward: unbounded, with mean 0 and standard deviation 1 over its authors' data.

    Args:
        weights: the published file, local or owner/name/file on the hub.
        tokenizer: BERT's, uncased, a folder or a hub name.
        dtype: float32, float16 or bfloat16 for BLIP; the head computes in float32.
    """
    source = require_file(place.reward, "weights", weights, revision)
    words = require_folder(place.reward, "tokenizer", tokenizer, files=["tokenizer_config.json"])

    def load() -> ScoreBatch:
        from transformers import BlipTextModel, BlipVisionModel

        tokenize = words.load_tokenizer()
        vision_state, text_state, head_state = from_blip(source.read_state())
        try:
            vision_config = _vision_config(vision_state)
            text_config = _text_config(text_state, vision_config.hidden_size)
        except KeyError as error:
            raise ConfigError(f"{source} is no ImageReward: without {error.args[0]}") from None
        vision = source.load_model(BlipVisionModel, vision_state, config=vision_config)
        text = source.load_model(BlipTextModel, text_state, config=text_config, add_pooling_layer=False)
        head = source.fill(ScoreHead(text.config.hidden_size), head_state).to(place.device)
        vision.to(place.device, place.dtype)
        text.to(place.device, place.dtype)
        size = vision_config.image_size
        preprocess = ImagePreprocessing(size, (size, size), OPENAI_MEAN, OPENAI_STD)

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            tokens = tokenize(
                prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            seen = vision(pixel_values=preprocess(images).to(place.dtype)).last_hidden_state
            read = text(
                input_ids=to_device(tokens["input_ids"], place.device),
                attention_mask=to_device(tokens["attention_mask"], place.device),
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=place.device),
            ).last_hidden_state
            scores: Tensor = head(read[:, 0].float())
            return (scores - MEAN) / STD

        return score

    return load


def from_blip(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Renames the weights of ImageReward as transformers names them: of its vision model, its text model, and its head.

    BLIP's projections for contrastive learning, which the score does not use, are dropped.
    """
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (_VISION, _TEXT, _HEAD)}
    for name, value in state.items():
        for prefix, part in parts.items():
            if name.startswith(prefix) and not name.endswith("position_ids"):
                own = name.removeprefix(prefix)
                part[renamed(own, _VISION_NAMES) if prefix == _VISION else own] = value
    return list(parts.values())


def _vision_config(state: Mapping[str, Tensor]) -> Any:
    """Makes the vision model's configuration from the shapes of its weights, and else from BLIP's numbers."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    positions = state["embeddings.position_embedding"].shape[1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(state, "encoder.layers."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        patch_size=patch,
        image_size=round((positions - 1) ** 0.5) * patch,
        layer_norm_eps=1e-6,
    )


def _text_config(state: Mapping[str, Tensor], vision_width: int) -> Any:
    """Makes the text model's configuration from the shapes of its weights, and else from BERT's numbers."""
    from transformers import BlipTextConfig

    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(state, "encoder.layer."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
    )


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Returns the number of layers, from the numbers in the names of their weights."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))
