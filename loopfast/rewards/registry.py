"""The names a configuration can give for a reward."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError
from loopfast.plugins import is_reference
from loopfast.rewards.base import Reward, RewardSet, RewardTerm
from loopfast.rewards.embedded import embedded, embedded_exact
from loopfast.rewards.jpeg_size import jpeg_compressibility, jpeg_incompressibility
from loopfast.rewards.user import user_reward

__all__ = ["REWARDS", "build_rewards"]

REWARDS: dict[str, Callable[..., Reward]] = {
    "embedded": embedded,
    "embedded_exact": embedded_exact,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}
"""Name of each reward of the package, and the function that makes it from its options."""


def build_rewards(terms: Sequence[RewardConfig]) -> RewardSet:
    """The rewards of a configuration, ready to score.

    Raises:
        ConfigError: a reward does not exist, cannot be imported, or does not take the options given.
    """
    return RewardSet([RewardTerm(term.name, _build(term), term.weight) for term in terms])


def _build(term: RewardConfig) -> Reward:
    if is_reference(term.name):
        return user_reward(term.name, term.options)
    if term.name not in REWARDS:
        near = difflib.get_close_matches(term.name, REWARDS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"no reward {term.name!r}; nearest: {near!r}; allowed: {', '.join(REWARDS)} or module:function"
        )
    try:
        return REWARDS[term.name](**term.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {term.name!r} does not take options {term.options}: {error}") from None
