"""What a checkpoint belongs to beside its configuration: prompts and rewards, which are files of their own.

A configuration names prompts and a user's reward, but what these names stand for can change while a run is stopped.
A checkpoint says what they stood for in a few readable parts, and for trajectories that are not yet learned from also
what they were sampled by.
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
"""A text or a list of numbers for each part, as JSON can hold them."""

# Another processor, or another release of torch, rounds a schedule's numbers differently.
_ROUNDING = 1e-6


def prompts_identity(prompts: Sequence[Prompt]) -> str:
    """A digest of the prompts' texts and metadata, in their order."""
    entries = [
        [prompt.text, sorted((str(key), _as_json(value)) for key, value in prompt.metadata.items())]
        for prompt in prompts
    ]
    return _digest(json.dumps(entries).encode())


def reward_identity(terms: Sequence[RewardConfig]) -> dict[str, str]:
    """For each reward that is ``module:function``, a digest of the module's file; modules without one are left out.

    What such a module imports is not looked at, nor are the weights of a pretrained reward.
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
    """What an iteration's trajectories were sampled for and scored by.

    Args:
        batch: the iteration's prompts.
        rewards: of the run, as `reward_identity` gives them.
        schedule: the iteration's transitions.
        trained: the steps that are trained on.
        latent_shape: of one image's latents.
    """
    return {
        "prompts.source": prompts_identity(batch),
        **rewards,
        "the schedule": [*map(float, schedule.table64.flatten()), *map(float, schedule.timesteps), *trained],
        "the latents' shape": [*latent_shape],
    }


def changed(before: Identity, now: Identity) -> list[str]:
    """The parts that are there both before and now, and differ."""
    return [part for part, value in before.items() if part in now and not _equal(value, now[part])]


def describe_changes(parts: Sequence[str]) -> str:
    """What `changed` has found, in words that ``than when ...`` may follow."""
    return ", ".join(
        f"{part} holds other prompts" if part.endswith(("prompts", "source")) else f"{part} is another"
        for part in dict.fromkeys(parts)
    )


def _as_json(value: Any) -> str:
    """Of what JSON does not have only the kind: its representation may hold an address, which is another each time."""
    return json.dumps(value, skipkeys=True, default=lambda thing: type(thing).__name__)


def _equal(before: Any, now: Any) -> bool:
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(
            math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for a, b in zip(before, now, strict=True)
        )
    return bool(before == now)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
