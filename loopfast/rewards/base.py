"""What a reward is, and the weighted sum of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loopfast.errors import RewardError

__all__ = ["Reward", "RewardSet", "RewardTerm", "Scores"]

_PROMPTS_SHOWN = 3


class Reward(Protocol):
    """Scores a batch of images. Higher is better; the scale is free.

    Args:
        images: float32 ``[N, 3, H, W]`` in [0, 1], not to be changed in place; on the sampler's device.
        prompts: the N texts the images were sampled from.
        metadata: the N prompts' metadata, such as ``{"category": "color"}``.

    Returns:
        N finite numbers: a tensor ``[N]`` of any device and real type, an array, or a list.
    """

    def __call__(  # noqa: D102
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], /
    ) -> Any: ...


@dataclass(frozen=True)
class RewardTerm:
    """A reward and its weight in the sum; with weight 0 it is measured only."""

    name: str
    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True)
class Scores:
    """Rewards of N images, float32 ``[N]`` on the CPU: the sum, and each term by name before weighting."""

    total: Tensor
    parts: dict[str, Tensor]


class RewardSet:
    """The weighted sum of rewards that a run trains on.

    Args:
        terms: the rewards, with names that differ.
    """

    def __init__(self, terms: Sequence[RewardTerm]) -> None:
        self.terms: tuple[RewardTerm, ...] = tuple(terms)

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        """Score a batch.

        Args:
            images: float32 ``[N, 3, H, W]`` in [0, 1].
            prompts: N texts.
            metadata: N mappings; None for N empty ones.

        Raises:
            RewardError: a reward raised, or gave anything but one finite number per image. ``images_index``
                holds the positions of the images at fault.
            ValueError: the lengths of the arguments differ.
        """
        count = images.shape[0]
        metadata = [{}] * count if metadata is None else metadata
        if len(prompts) != count or len(metadata) != count:
            raise ValueError(
                f"{count} images, {len(prompts)} prompts and {len(metadata)} metadata do not match"
            )
        parts: dict[str, Tensor] = {}
        total = torch.zeros(count, dtype=torch.float64)
        for term in self.terms:
            part = _score(term, images, prompts, metadata)
            parts[term.name] = part
            total += term.weight * part.double()
        total = total.float()
        _require_finite("the weighted sum of the rewards", total, prompts)
        return Scores(total, parts)


def _score(
    term: RewardTerm, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Tensor:
    """One term's values, float32 ``[N]`` on the CPU, checked."""
    name = f"reward {term.name!r}"
    count = len(prompts)
    everything = range(count)
    batch = f"for {count} image(s), prompts {_quoted(prompts, everything)}"
    try:
        found = term.reward(images, list(prompts), [dict(entry) for entry in metadata])
    except Exception as error:
        raise RewardError(f"{name} raised {type(error).__name__}: {error} ({batch})", everything) from error
    values = _as_tensor(found)
    if values is None:
        raise RewardError(
            f"{name} returned {_described(found)} {batch}; allowed: a tensor, array or list of numbers",
            everything,
        )
    if values.shape != (count,):
        shape = f"{len(values)} value(s)" if values.ndim == 1 else f"values of shape {list(values.shape)}"
        raise RewardError(f"{name} returned {shape} {batch}; allowed: {count} value(s)", everything)
    values = values.to("cpu", torch.float32)
    _require_finite(name, values, prompts)
    return values


def _as_tensor(found: object) -> Tensor | None:
    """What a reward returned as a tensor of real numbers of any shape; None where it is no such thing."""
    if isinstance(found, list | tuple):
        try:
            numbers = [None if isinstance(item, str | bytes) else float(item) for item in found]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return None
        return None if None in numbers else torch.tensor(numbers, dtype=torch.float64)
    try:
        values = found.detach() if isinstance(found, Tensor) else torch.as_tensor(found)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return None if values.is_complex() else values


def _require_finite(name: str, values: Tensor, prompts: Sequence[str]) -> None:
    at_fault = (~values.isfinite()).nonzero().flatten().tolist()
    if at_fault:
        shown = ", ".join(f"{values[index]:g}" for index in at_fault[:_PROMPTS_SHOWN])
        raise RewardError(
            f"{name} is not finite for {len(at_fault)} of {len(prompts)} image(s): {shown} for "
            f"prompts {_quoted(prompts, at_fault)}",
            at_fault,
        )


def _quoted(prompts: Sequence[str], positions: Sequence[int]) -> str:
    shown = ", ".join(repr(prompts[position]) for position in positions[:_PROMPTS_SHOWN])
    rest = len(positions) - _PROMPTS_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _described(found: object) -> str:
    text = repr(found)
    return f"{type(found).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
