"""T2I-CompBench's score of complex compositions: the mean of up to three others.

As in the benchmark's code (arXiv 2307.06350; ``3_in_1_eval/3_in_1.py``), every prompt of the category ``complex``
names attributes, scored by `blip_vqa`, and a spatial relation, scored by `spatial`, an action, scored by `clip_score`,
or both. The score is the mean of the scores that apply. The benchmark removes the adjectives from the text that CLIP
reads; this code does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.base import Reward
from loopfast.rewards.models.blip_vqa import blip_vqa as _blip_vqa
from loopfast.rewards.models.clip_score import clip_score as _clip_score
from loopfast.rewards.models.pretrained import PretrainedReward
from loopfast.rewards.models.spatial import relation_of
from loopfast.rewards.models.spatial import spatial as _spatial

__all__ = ["ThreeInOne", "prompt_aspects", "three_in_one"]

_RELATION = r"(?:on top of|on (?:the )?bottom of|on the (?:top|left|right) of|next to|on side of|near)\b"
_SPATIAL = re.compile(rf"\b{_RELATION}", re.IGNORECASE)
_ONLY_SPATIAL = re.compile(rf"\b(?:is|are|was|were) {_RELATION}", re.IGNORECASE)


def prompt_aspects(prompt: str) -> tuple[str, ...]:
    """Returns which of attribute, spatial and action apply to a prompt.

    A relation after a form of "to be" is spatial only, a relation after another verb is an action, too, and a prompt
    without a relation has an action. For 299 of the 300 prompts of ``complex_val.txt`` the benchmark's lists agree.
    """
    if _ONLY_SPATIAL.search(prompt):
        return "attribute", "spatial"
    if _SPATIAL.search(prompt):
        return "attribute", "spatial", "action"
    return "attribute", "action"


class ThreeInOne:
    """The mean of the rewards whose aspects apply to a prompt.

    Args:
        rewards: the rewards by aspect: attribute, spatial, action.
    """

    def __init__(self, rewards: Mapping[str, PretrainedReward]) -> None:
        self.rewards = rewards

    def load(self) -> None:
        """Reads the weights of all, unless they are read already."""
        for reward in self.rewards.values():
            reward.load()

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Returns the scores, float32 ``[N]`` on the CPU; see `loopfast.rewards.base.Reward`.

        The aspects are those of ``metadata["aspects"]``, which T2I-CompBench's prompts have if its lists are found,
        else those of `prompt_aspects`. A prompt with the aspect spatial in which no relation of two objects is found
        gets 0 for it, as in the benchmark.
        """
        aspects = [
            entry.get("aspects") or prompt_aspects(prompt)
            for prompt, entry in zip(prompts, metadata, strict=True)
        ]
        total = torch.zeros(len(prompts))
        for aspect, reward in self.rewards.items():
            rows = [index for index, found in enumerate(aspects) if aspect in found]
            if aspect == "spatial":
                rows = [row for row in rows if relation_of(prompts[row], metadata[row]) is not None]
            if rows:
                total[rows] += reward(images[rows], [prompts[i] for i in rows], [metadata[i] for i in rows])
        return total / torch.tensor([float(len(found)) for found in aspects])


def three_in_one(
    blip_vqa: Mapping[str, Any] | None = None,
    spatial: Mapping[str, Any] | None = None,
    clip_score: Mapping[str, Any] | None = None,
) -> Reward:
    """The mean of those of `blip_vqa`, `spatial` and `clip_score` whose aspects apply to the prompt.

    Args:
        blip_vqa, spatial, clip_score: options of each, such as ``{weights: /models/blip}``.
    """
    built = {}
    for aspect, make, options in (
        ("attribute", _blip_vqa, blip_vqa),
        ("spatial", _spatial, spatial),
        ("action", _clip_score, clip_score),
    ):
        key = f"reward 'three_in_one': {make.__name__}: "
        options = options or {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"{key}found {options!r}, allowed: options by name")
        try:
            built[aspect] = make(**options)
        except TypeError as error:
            raise ConfigError(f"{key}{error}") from None
    return ThreeInOne(built)
