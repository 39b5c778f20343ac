"""The rewards that a configuration can name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError, MissingExtraError
from loopfast.rewards.base import Reward, RewardSet, RewardTerm
from loopfast.rewards.embedded import embedded, embedded_exact
from loopfast.rewards.http import http
from loopfast.rewards.jpeg_size import jpeg_compressibility, jpeg_incompressibility
from loopfast.rewards.models.aesthetic import aesthetic
from loopfast.rewards.models.blip_vqa import blip_vqa
from loopfast.rewards.models.clip_score import clip_score
from loopfast.rewards.models.depth import DEPTH_ANYTHING
from loopfast.rewards.models.detection import OWLV2
from loopfast.rewards.models.hps_v2 import hps_v2
from loopfast.rewards.models.image_reward import image_reward
from loopfast.rewards.models.numeracy import numeracy
from loopfast.rewards.models.ocr import ocr
from loopfast.rewards.models.pickscore import pickscore
from loopfast.rewards.models.pretrained import PretrainedReward
from loopfast.rewards.models.spatial import spatial, spatial_3d
from loopfast.rewards.models.three_in_one import ThreeInOne, three_in_one
from loopfast.rewards.models.vqa_score import vqa_score
from loopfast.rewards.normalize import bounds
from loopfast.rewards.user import checked_reward, user_reward
from loopfast.system.plugins import is_reference, reference_of_path

__all__ = ["REWARDS", "RewardInfo", "build_rewards", "find_reward"]


@dataclass(frozen=True)
class RewardInfo:
    """A reward of the package.

    Attributes:
        make: makes the reward from its options.
        summary: its meaning, in a few words.
        weights, license: origin of its weights, and their license; None if it has none.
        extra: the package's extra with its imports; None means ``train``.
        range: range of its values.
    """

    make: Callable[..., Reward]
    summary: str
    weights: str | None = None
    license: str | None = None
    extra: str | None = None
    range: str = "0 to 1"


_CLIP = "openai/clip-vit-large-patch14"
_BLIP = "Salesforce/blip-vqa-capfilt-large"
_INFOS = (
    RewardInfo(embedded, "faithfulness to a caption of the embedded world"),
    RewardInfo(embedded_exact, "exact faithfulness in the embedded world", range="0 or 1"),
    RewardInfo(jpeg_compressibility, "minus the size as a JPEG, in kB", range="below 0"),
    RewardInfo(jpeg_incompressibility, "size as a JPEG, in kB", range="above 0"),
    RewardInfo(
        aesthetic,
        "LAION's aesthetic score",
        f"{_CLIP}, trl-lib/ddpo-aesthetic-predictor",
        "MIT (CLIP); Apache-2.0 (head)",
        range="about 1 to 10",
    ),
    RewardInfo(clip_score, "agreement of image and prompt by CLIP", _CLIP, "MIT", range="-1 to 1"),
    RewardInfo(
        pickscore,
        "human preference, learned on Pick-a-Pic",
        "yuvalkirstain/PickScore_v1",
        "see its model card",
        range="-s to s, s the model's logit scale",
    ),
    RewardInfo(hps_v2, "human preference, HPS v2.1 or v2", "xswu/HPSv2", "Apache-2.0", range="-1 to 1"),
    RewardInfo(
        image_reward,
        "human preference, ImageReward",
        "THUDM/ImageReward",
        "Apache-2.0",
        range="unbounded; mean 0, deviation 1",
    ),
    RewardInfo(
        blip_vqa, "attributes bound to their objects (T2I-CompBench's, by BLIP)", _BLIP, "BSD-3-Clause"
    ),
    RewardInfo(
        vqa_score,
        'probability of "yes, this shows the prompt" (VQAScore)',
        "Salesforce/instructblip-flan-t5-xl",
        "MIT",
    ),
    RewardInfo(
        ocr,
        "how much of the text asked for can be read",
        "in the package rapidocr",
        "Apache-2.0",
        extra="ocr",
    ),
    RewardInfo(
        spatial,
        "two objects beside, above or near each other as the prompt says (T2I-CompBench's geometry)",
        OWLV2,
        "Apache-2.0",
    ),
    RewardInfo(
        spatial_3d,
        "an object in front of or behind the other as the prompt says (T2I-CompBench's geometry)",
        f"{OWLV2}, {DEPTH_ANYTHING}",
        "Apache-2.0",
    ),
    RewardInfo(numeracy, "as many objects as the prompt says (T2I-CompBench's rules)", OWLV2, "Apache-2.0"),
    RewardInfo(
        three_in_one,
        "mean of blip_vqa, spatial and clip_score for complex prompts (T2I-CompBench's)",
        f"{_BLIP}, {OWLV2}, {_CLIP}",
        "BSD-3-Clause (BLIP); Apache-2.0 (OWLv2); MIT (CLIP)",
    ),
    RewardInfo(http, "what a reward server says (docs/reward-server.md)", range="the server's"),
)
REWARDS: dict[str, RewardInfo] = {info.make.__name__: info for info in _INFOS}
"""The rewards of the package by their names."""


def find_reward(name: str) -> RewardInfo:
    """Returns the reward of the package with this name.

    Raises:
        ConfigError: the package has no such reward.
    """
    if name not in REWARDS:
        if name.startswith("<"):
            raise ConfigError(
                f"reward {name!r} is an object that a Python program gave, and that a configuration cannot name; give "
                "it again: loopfast.train(..., reward=...)"
            )
        if advice := reference_of_path(name):
            raise ConfigError(f"reward {name!r}: {advice}")
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"no reward {name!r}; nearest: {near!r}; allowed: {', '.join(REWARDS)} or module:function"
        )
    return REWARDS[name]


def build_rewards(
    terms: Sequence[RewardConfig],
    *,
    load: bool = True,
    full_batch: bool = False,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> RewardSet:
    """Builds the rewards of a configuration.

    Args:
        terms: the rewards.
        load: reads weights now. False checks options and that local weights exist, and leaves reading them to the first
            call.
        full_batch: see `RewardSet`.
        functions: functions of a Python program by the names that the terms have for them.

    Raises:
        RewardMemoryError: weights do not fit into a GPU's memory.
        ConfigError: a reward does not exist, cannot be imported, does not take the options given, or its weights cannot
            be read.
    """
    return RewardSet(
        [
            RewardTerm(term.title, _build(term, load, functions or {}), term.weight, bounds(term))
            for term in terms
        ],
        full_batch=full_batch,
    )


def _build(term: RewardConfig, load: bool, functions: Mapping[str, Callable[..., Any]]) -> Reward:
    if term.name in functions:
        return checked_reward(term.name, functions[term.name], term.options)
    if is_reference(term.name):
        return user_reward(term.name, term.options)
    info = find_reward(term.name)
    try:
        try:
            reward = info.make(**term.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reward {term.name!r} does not take options {term.options}: {error}") from None
        if load and isinstance(reward, PretrainedReward | ThreeInOne):
            reward.load()
    except ModuleNotFoundError as error:
        missing = MissingExtraError(f"reward {term.name!r}", info.extra or "train", error.name)
        raise ConfigError(str(missing)) from error
    return reward
