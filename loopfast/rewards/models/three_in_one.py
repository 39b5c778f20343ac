"""T2I-CompBench's score of complex compositions: the mean of up to three others.

As in the benchmark's code (arXiv 2307.06350; ``3_in_1_eval/3_in_1.py``): every prompt of the category ``complex``
speaks of attributes, judged by `blip_vqa`, and of a spatial relation, judged by `spatial`, of an action, judged by
`clip_score`, or of both; the score is the mean of those it speaks of. The benchmark leaves the adjectives out of what
CLIP reads; this does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError
from loopfast.rewards.base import Reward
from loopfast.rewards.models.blip_vqa import blip_vqa
from loopfast.rewards.models.clip_score import clip_score
from loopfast.rewards.models.spatial import given_relation, spatial

__all__ = ["ThreeInOne", "prompt_aspects", "three_in_one"]

_RELATION = r"(?:on top of|on (?:the )?bottom of|on the (?:top|left|right) of|next to|on side of|near)\b"
_SPATIAL = re.compile(rf"\b{_RELATION}", re.IGNORECASE)
_ONLY_SPATIAL = re.compile(rf"\b(?:is|are|was|were) {_RELATION}", re.IGNORECASE)


def prompt_aspects(prompt: str) -> tuple[str, ...]:
    """Which of attribute, spatial and action a prompt speaks of.

    A relation after a form of "to be" is spatial only, a relation after another verb is an action, too, and without a
    relation there is an action only. Of the 300 prompts of ``complex_val.txt`` that is what the benchmark's own lists
    say but for one.
    """
    if _ONLY_SPATIAL.search(prompt):
        return "attribute", "spatial"
    if _SPATIAL.search(prompt):
        return "attribute", "spatial", "action"
    return "attribute", "action"


class ThreeInOne:
    """The mean of the rewards that judge what each prompt speaks of.

    Args:
        rewards: by aspect: attribute, spatial, action.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = dict(rewards)

    def load(self) -> None:
        """Reads the weights of all; nothing the second time."""
        for reward in self.rewards.values():
            if hasattr(reward, "load"):
                reward.load()

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores float32 ``[N]`` on the CPU; see `loopfast.rewards.base.Reward`.

        ``metadata["aspects"]``, which T2I-CompBench's prompts have where its lists are there, says what a prompt speaks
        of; else `prompt_aspects` does. A prompt that is said to have a relation, but in which none of two objects is
        found, has 0 for it, as in the benchmark.
        """
        aspects = [
            entry.get("aspects") or prompt_aspects(prompt)
            for prompt, entry in zip(prompts, metadata, strict=True)
        ]
        total = torch.zeros(len(prompts))
        for aspect, reward in self.rewards.items():
            speaks = [index for index, found in enumerate(aspects) if aspect in found]
            rows = [
                index
                for index in speaks
                if aspect != "spatial" or given_relation(prompts[index], metadata[index]) is not None
            ]
            if rows:
                scores = reward(images[rows], [prompts[i] for i in rows], [metadata[i] for i in rows])
                total[rows] += torch.as_tensor(scores, dtype=torch.float32).cpu()
        return total / torch.tensor([float(len(found)) for found in aspects])


def three_in_one(
    blip_vqa: Mapping[str, Any] | None = None,
    spatial: Mapping[str, Any] | None = None,
    clip_score: Mapping[str, Any] | None = None,
) -> Reward:
    """The mean of `blip_vqa`, `spatial` and `clip_score`, of those that judge what the prompt speaks of.

    Args:
        blip_vqa, spatial, clip_score: options of each, such as ``{weights: /models/blip}``.

    Raises:
        ConfigError: options are not allowed, or the weights cannot be used.
    """
    given = {"blip_vqa": blip_vqa, "spatial": spatial, "clip_score": clip_score}
    built = {}
    for aspect, name in (("attribute", "blip_vqa"), ("spatial", "spatial"), ("action", "clip_score")):
        options = given[name] or {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"reward 'three_in_one': {name}: found {options!r}, allowed: options by name")
        try:
            built[aspect] = _MAKERS[name](**options)
        except TypeError as error:
            raise ConfigError(f"reward 'three_in_one': {name}: {error}") from None
    return ThreeInOne(built)


_MAKERS: dict[str, Callable[..., Reward]] = {
    "blip_vqa": blip_vqa,
    "spatial": spatial,
    "clip_score": clip_score,
}
