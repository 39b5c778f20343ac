"""Text rendering: the share of the text that a prompt asks for that can be read in the image.

The reward of Flow-GRPO (Liu et al., arXiv 2505.05470; `flow_grpo/ocr.py`):

    r = max(0, 1 − N_e / N),

where N_e is the least number of edits (insertions, deletions, substitutions of a letter) between the text read and the
text wanted, and N the length of the text wanted; 1 if the text read contains it. Letter case and spaces do not count.
The text is read by RapidOCR, which runs PaddleOCR's models in ONNX; Flow-GRPO reads it by PaddleOCR itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError, RewardError
from loopfast.rewards.base import Reward, shown
from loopfast.rewards.models.pretrained import PretrainedReward, ScoreBatch, placement

__all__ = ["ocr", "similarity", "wanted_text"]

_QUOTED = re.compile(r"[\"“]([^\"“”]*)[\"”]")


def ocr(weights: str | None = None) -> Reward:
    """Score of an image that shows the text its prompt asks for, in [0, 1].

    The text is the metadata's ``text``, if given, else the first text between double quotes in the prompt. Images
    are read one by one on the CPU.

    Args:
        weights: a folder with one ONNX model of PaddleOCR for detection (``*det*.onnx``) and one for recognition
            (``*rec*.onnx``); None takes those of RapidOCR's package.
    """
    paths = {} if weights is None else _models(weights)
    place = placement("ocr", "cpu", "float32", batch_size=1)

    def load() -> ScoreBatch:
        from rapidocr import RapidOCR

        # as in Flow-GRPO, text that is upside down is not turned
        engine = RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False, **paths})

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            wanted = [wanted_text(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
            pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            read = ["".join(engine(bgr).txts or ()) for bgr in pixels.flip(-1).contiguous().numpy()]
            return torch.tensor([similarity(*texts) for texts in zip(read, wanted, strict=True)])

        return score

    return PretrainedReward(place, load)


def wanted_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """Returns the text that an image of this prompt should show.

    Raises:
        RewardError: neither the metadata nor the prompt has one.
    """
    if "text" in metadata:
        text, where = metadata["text"], "metadata text"
    else:
        match = _QUOTED.search(prompt)
        text, where = (match.group(1) if match else ""), "text between double quotes"
    if not isinstance(text, str) or not _normalized(text):
        raise RewardError(
            f"prompt {shown(prompt)}: {where}: found {text!r}, expected: the text that the image should show"
        )
    return text


def similarity(found: str, wanted: str) -> float:
    """Returns 1 − edits / length, at least 0; 1 if ``found`` contains ``wanted``. Case and spaces do not count."""
    found, wanted = _normalized(found), _normalized(wanted)
    if wanted in found:
        return 1.0
    return 1.0 - min(_edits(found, wanted), len(wanted)) / len(wanted)


def _normalized(text: str) -> str:
    return "".join(text.lower().split())


def _edits(first: str, second: str) -> int:
    """Returns Levenshtein's distance."""
    above = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            substituted = above[column - 1] + (letter != other)
            current.append(min(above[column] + 1, current[-1] + 1, substituted))
        above = current
    return above[-1]


def _models(weights: str) -> dict[str, str]:
    """Returns RapidOCR's options for the models of a folder."""
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"reward 'ocr': weights: {weights!r} is no folder")
    paths = {}
    for option, part in (("Det.model_path", "det"), ("Rec.model_path", "rec")):
        found = sorted(folder.glob(f"*{part}*.onnx"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise ConfigError(
                f"reward 'ocr': weights {weights!r}: *{part}*.onnx: found {names}, expected: one file"
            )
        paths[option] = str(found[0])
    return paths
