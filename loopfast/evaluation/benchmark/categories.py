"""The categories of T2I-CompBench (arXiv 2307.06350)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopfast.config import RewardConfig
from loopfast.evaluation.benchmark.run import Category
from loopfast.prompts import load_prompts
from loopfast.prompts.t2i_compbench import CATEGORIES

TITLES: dict[str, str] = {
    "color": "Color",
    "shape": "Shape",
    "texture": "Texture",
    "spatial": "2D-Spatial",
    "3d_spatial": "3D-Spatial",
    "numeracy": "Numeracy",
    "non_spatial": "Non-Spatial",
    "complex": "Complex",
}
"""The columns of the paper's tables."""

# The benchmark's CLIP is ViT-B/32. The main branch on the hub has pickles only; this revision has safetensors.
_CLIP = {"weights": "openai/clip-vit-base-patch32", "revision": "refs/pr/15"}
_METRICS: dict[str, RewardConfig] = {
    "color": RewardConfig(name="blip_vqa"),
    "shape": RewardConfig(name="blip_vqa"),
    "texture": RewardConfig(name="blip_vqa"),
    "spatial": RewardConfig(name="spatial"),
    "3d_spatial": RewardConfig(name="spatial_3d"),
    "numeracy": RewardConfig(name="numeracy"),
    "non_spatial": RewardConfig(name="clip_score", options=_CLIP),
    "complex": RewardConfig(name="three_in_one", options={"clip_score": _CLIP}),
}


def t2i_compbench(directory: Path, names: Sequence[str] = CATEGORIES) -> list[Category]:
    """Reads categories from the folder of the prompt files: their 300 prompts to evaluate on, and their metrics.

    `spatial`, `spatial_3d` and `numeracy` use another detector than the benchmark. The other metrics are the same.

    Raises:
        ConfigError: a file is missing or cannot be used.
    """
    return [
        Category(name, load_prompts(f"t2i-compbench:{directory}:{name}-val"), _METRICS[name])
        for name in names
    ]
