"""Writes pipelines so that earlier releases of transformers read them, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_PREFIX = "text_model."


def save_portable(pipeline: StableDiffusionPipeline, directory: Path) -> None:
    """Writes a Stable Diffusion pipeline that transformers 4 and 5 read alike.

    What transformers 5 writes, transformers 4 does not: it misses the prefix ``text_model.`` in the names of CLIP's
    weights, for which it goes on with random ones, and the tokenizer's ``vocab.json`` and ``merges.txt``.
    """
    pipeline.save_pretrained(directory)
    for file in (directory / "model_index.json", *directory.glob("*/config.json")):
        config = json.loads(file.read_text("utf-8"))
        # the folder it was loaded from, which is nobody else's business
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    weights = directory / "text_encoder" / "model.safetensors"
    if type(pipeline.text_encoder).__name__ == "CLIPTextModel" and weights.is_file():
        named = load_file(weights)
        renamed = {_PREFIX + name.removeprefix(_PREFIX): value for name, value in named.items()}
        save_file(renamed, weights, metadata={"format": "pt"})
    tokenizer = directory / "tokenizer"
    if not (tokenizer / "vocab.json").exists():
        model = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]
        vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        (tokenizer / "vocab.json").write_text(vocabulary, "utf-8")
        rules = "\n".join(rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"])
        (tokenizer / "merges.txt").write_text(f"#version: 0.2\n{rules}\n", "utf-8")
