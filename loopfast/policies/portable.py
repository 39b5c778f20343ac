"""Writes pipelines that transformers 4 and 5 read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_PREFIX = "text_model."


def save_portable(pipeline: Any, directory: Path) -> None:
    """Writes a diffusers pipeline that transformers 4 and 5 read in the same way.

    Transformers 4 does not read all that transformers 5 writes. In the names of CLIP's weights it needs the prefix
    ``text_model.``, and without it continues with random weights. It needs ``vocab.json`` and ``merges.txt`` of CLIP's
    tokenizer. Its ``T5Tokenizer`` needs a model of sentencepiece, while its ``T5TokenizerFast`` reads
    ``tokenizer.json``, with the additional special tokens under another name.
    """
    for component in pipeline.components.values():
        tokenizer = getattr(component, "backend_tokenizer", None)
        if tokenizer is not None:
            # the padding and truncation of its last call would be written too
            tokenizer.no_padding()
            tokenizer.no_truncation()
    pipeline.save_pretrained(directory)
    for name, component in pipeline.components.items():
        kind = type(component).__name__
        if kind == "CLIPTextModel":
            component.save_pretrained(directory / name, state_dict=text_model_names(component.state_dict()))
        elif kind.startswith("CLIPTokenizer") and not (directory / name / "vocab.json").exists():
            component.backend_tokenizer.model.save(str(directory / name))
    index = directory / "model_index.json"
    index.write_text(index.read_text("utf-8").replace('"T5Tokenizer"', '"T5TokenizerFast"'), "utf-8")
    for file in (index, *directory.glob("*/config.json")):
        config = json.loads(file.read_text("utf-8"))
        # the folder that it was loaded from is private
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for file in directory.glob("*/tokenizer_config.json"):
        config = json.loads(file.read_text("utf-8"))
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def text_model_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a ``CLIPTextModel`` under transformers 4's names, which 5 reads too."""
    return {_PREFIX + name.removeprefix(_PREFIX): value for name, value in weights.items()}
