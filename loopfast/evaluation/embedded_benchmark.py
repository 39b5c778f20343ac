"""The embedded benchmark: held-out captions of the embedded world, judged by its detector."""

from __future__ import annotations

from collections.abc import Sequence

from loopfast.config import RewardConfig
from loopfast.embedded.world import CATEGORIES
from loopfast.evaluation.benchmark import Category
from loopfast.prompts import load_prompts


def embedded_benchmark(names: Sequence[str] = CATEGORIES) -> list[Category]:
    """Categories with their held-out captions."""
    return [
        Category(name, load_prompts(f"embedded:{name}-heldout"), RewardConfig(name="embedded"))
        for name in names
    ]
