"""Human preference score, version 2 and 2.1 (Wu et al., arXiv 2306.09341; github.com/tgxs002/HPSv2).

The published weights are those of open_clip's ViT-H-14, under open_clip's names; they are read into the same model of
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.models.clip_score import clip_similarity
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, number, pretrained
from loopfast.rewards.models.weights import is_file, renamed, require_file, require_folder

__all__ = ["from_open_clip", "hps_v2"]

# open_clip's names, and those of transformers
_NAMES = (
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", "text_projection.weight"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"transformer\.resblocks\.(.+)", r"text_model.encoder.layers.\1"),
    (r"visual\.transformer\.resblocks\.(.+)", r"vision_model.encoder.layers.\1"),
    (r"(.+\.layers\.\d+)\.ln_(\d\.\w+)", r"\1.layer_norm\2"),
    (r"(.+\.layers\.\d+)\.attn\.in_proj_(\w+)", r"\1.self_attn.qkv_proj.\2"),
    (r"(.+\.layers\.\d+)\.attn\.out_proj\.(\w+)", r"\1.self_attn.out_proj.\2"),
    (r"(.+\.layers\.\d+)\.mlp\.c_fc\.(\w+)", r"\1.mlp.fc1.\2"),
    (r"(.+\.layers\.\d+)\.mlp\.c_proj\.(\w+)", r"\1.mlp.fc2.\2"),
)


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
        new = renamed(name, _NAMES)
        if ".qkv_proj." in new:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[new.replace(".qkv_", f".{letter}_")] = third.contiguous()
        else:
            converted[new] = value.T.contiguous() if name in ("text_projection", "visual.proj") else value
    return converted
