"""Rewards: functions that say how good each image is.

A reward takes the images of a batch, their prompts and the prompts' metadata, and gives one number per image;
see `Reward`. The package's own have a file each and a name in `REWARDS`; the user's own are named
``module:function`` in the configuration.
"""

from loopfast.rewards.base import Reward, RewardSet, RewardTerm, Scores
from loopfast.rewards.fitting import RewardMemoryError
from loopfast.rewards.normalize import training_rewards
from loopfast.rewards.process import RewardProcess
from loopfast.rewards.registry import REWARDS, build_rewards
from loopfast.rewards.thread import RewardThread, join_scores

__all__ = [
    "REWARDS",
    "Reward",
    "RewardMemoryError",
    "RewardProcess",
    "RewardSet",
    "RewardTerm",
    "RewardThread",
    "Scores",
    "build_rewards",
    "join_scores",
    "training_rewards",
]
