"""Digests of the prompts and rewards that a checkpoint belongs to.

A configuration names prompts and a user's reward. The files behind these names can change while a run is stopped. So a
checkpoint stores their digests. Beside an unfinished rollout it also stores what the rollout was sampled with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loopfast.config import RewardConfig
from loopfast.prompts import Prompt
from loopfast.schedules import TransitionSchedule
from loopfast.system.plugins import is_reference, source_file

Identity = Mapping[str, Any]
"""A text or a list of numbers for each part, in the types of JSON."""

# Another processor or another release of torch may round a schedule's numbers differently.
_ROUNDING = 1e-6


def prompts_identity(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of the prompts' texts and metadata, in their order."""
    entries = [
        [prompt.text, sorted((str(key), _as_json(value)) for key, value in prompt.metadata.items())]
        for prompt in prompts
    ]
    return _digest(json.dumps(entries).encode())


def reward_identity(terms: Sequence[RewardConfig]) -> dict[str, str]:
    """Returns a digest of the module's file for each reward that is ``module:function``.

    Modules without a file, modules that the file imports and the weights of pretrained rewards are not included.
    """
    files = {term.name: source_file(term.name) for term in terms if is_reference(term.name)}
    return {
        f"the file of reward {name!r}": _digest(file.read_bytes())
        for name, file in files.items()
        if file is not None and file.is_file()
    }


def sampled_identity(
    batch: Sequence[Prompt],
    rewards: Identity,
    schedule: TransitionSchedule,
    trained: Sequence[int],
    latent_shape: Sequence[int],
) -> dict[str, Any]:
    """Returns digests of everything that determines an iteration's trajectories and rewards.

    Args:
        batch: the iteration's prompts.
        rewards: the result of `reward_identity`.
        schedule: the iteration's transitions.
        trained: the steps that are trained on.
        latent_shape: the shape of one image's latents.
    """
    return {
        "prompts.source": prompts_identity(batch),
        **rewards,
        "the schedule": [*map(float, schedule.table64.flatten()), *map(float, schedule.timesteps), *trained],
        "the latents' shape": [*latent_shape],
    }


def changed(before: Identity, now: Identity) -> list[str]:
    """Returns the parts that exist both before and now, and differ."""
    return [part for part, value in before.items() if part in now and not _equal(value, now[part])]


def describe_changes(parts: Sequence[str]) -> str:
    """Returns a text about changed parts, which ``than when ...`` can follow."""
    return ", ".join(
        f"{part} holds other prompts" if part.endswith(("prompts", "source")) else f"{part} is another"
        for part in dict.fromkeys(parts)
    )


def _as_json(value: Any) -> str:
    """Returns a value as JSON. An object is replaced by its type's name, as its text may hold a memory address."""
    return json.dumps(value, skipkeys=True, default=lambda thing: type(thing).__name__)


def _equal(before: Any, now: Any) -> bool:
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(
            math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for a, b in zip(before, now, strict=True)
        )
    return bool(before == now)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
