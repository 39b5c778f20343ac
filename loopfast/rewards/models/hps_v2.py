"""Human preference score, version 2 and 2.1 (Wu et al., arXiv 2306.09341; github.com/tgxs002/HPSv2).

The published weights are those of open_clip's ViT-H-14, under open_clip's names; they are read into the same model of
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.models.clip_score import clip_similarity
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, number, pretrained
from loopfast.rewards.models.weights import is_file, require_file, require_folder

__all__ = ["from_open_clip", "hps_v2"]

# open_clip's names outside of the layers, and those of transformers
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")
_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


@pretrained
def hps_v2(
    place: Placement,
    weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    scale: float = 1.0,
    revision: str | None = None,
) -> Callable[[], ScoreBatch]:
    """Human preference score v2.1: the cosine similarity of image and prompt, in [-1, 1] times scale.

    Args:
        weights: a file with open_clip's names, local or owner/name/file on the hub (HPS_v2_compressed.pt is version 2),
            or a CLIP model of transformers, a folder or a hub name.
        processor: configuration, tokenizer and image processor of CLIP ViT-H/14, a folder or a hub name; with a model
            of transformers as weights, its tokenizer and image processor.
        scale: factor of the similarity; the benchmark's tables take 100.
    """
    as_file = is_file(weights)
    source = (require_file if as_file else require_folder)(place.reward, "weights", weights, revision)
    base = require_folder(
        place.reward, "processor", processor, files=("config.json", "preprocessor_config.json")
    )
    factor = number(place.reward, "scale", scale)

    def load() -> ScoreBatch:
        from transformers import CLIPConfig, CLIPModel

        if as_file:
            config = base.load_config(CLIPConfig)
            state = source.read_state()
            if "visual.proj" not in state:
                raise ConfigError(f"{source} is no CLIP model of open_clip: without visual.proj")
            model = source.load_model(CLIPModel, from_open_clip(state), config=config)
        else:
            model = source.load_model(CLIPModel)
        return clip_similarity(place, model, base, factor)

    return load


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a CLIP model of open_clip as transformers' ``CLIPModel`` names them.

    The projections are transposed, and the joint projection to queries, keys and values is split in three. Names that
    open_clip does not have stay as they are.
    """
    converted = {}
    for name, value in state.items():
        layer = _LAYER.fullmatch(name)
        if name in _NAMES:
            converted[_NAMES[name]] = value.T.contiguous() if name in _TRANSPOSED else value
        elif layer is None:
            converted[name] = value
        else:
            part, kind = layer[3], layer[4]
            stem = f"{'vision' if layer[1] else 'text'}_model.encoder.layers.{layer[2]}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{stem}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
            else:
                converted[f"{stem}.{_LAYER_NAMES.get(part, part)}.{kind}"] = value
    return converted
