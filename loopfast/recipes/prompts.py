"""Prompts of the recipes that need no file."""

from __future__ import annotations

_ANIMALS = """
ant bat bear bee beetle bird butterfly camel cat chicken cow deer dog dolphin duck fish fly fox frog goat goose gorilla
hedgehog horse kangaroo lion lizard llama monkey mouse pig rabbit raccoon rat shark sheep snake spider squirrel tiger
turkey turtle whale wolf zebra
"""


def animals() -> list[str]:
    """The 45 common animals of DDPO's aesthetic experiment (Black et al., arXiv 2305.13301, appendix), a word each."""
    return _ANIMALS.split()
