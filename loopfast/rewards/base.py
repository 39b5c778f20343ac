"""The interface of a reward, and the weighted sum of several."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loopfast.errors import RewardError, one_line
from loopfast.rewards.fitting import ImagesPerCall, RewardMemoryError
from loopfast.system.memory import is_out_of_memory

__all__ = ["CountError", "Reward", "RewardSet", "RewardTerm", "Scores", "listed", "quoted", "scaled", "shown"]

_MOST_SHOWN = 3
_PROMPT_LENGTH = 60


class CountError(RewardError):
    """A wrong number of scores that a reward has received from elsewhere."""


class Reward(Protocol):
    """A function that scores a batch of images. Higher is better; the scale is free.

    Args:
        images: float32 ``[N, 3, H, W]`` in [0, 1], on the sampler's device; a copy that the reward may change.
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
    """A reward and its weight in the sum; with weight 0 it is measured only.

    ``range``: two values that count as 0 and 1 in the sum, by a straight line; None takes the values as they are.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scores:
    """Rewards of N images, float32 ``[N]`` on the CPU: the sum, and each term by name before weighting.

    ``problems``: by reward, the error of scores that have become NaN instead of ending the call.
    """

    total: Tensor
    parts: dict[str, Tensor]
    problems: Mapping[str, str] = field(default_factory=dict)


class RewardSet:
    """The weighted sum of rewards that a run trains on.

    A reward that runs out of a GPU's memory is called again with half of the images, and so on.

    Args:
        terms: the rewards, with names that differ.
        full_batch: calls a reward with all images of a batch or not at all, as it may compare them.
    """

    def __init__(self, terms: Sequence[RewardTerm], *, full_batch: bool = False) -> None:
        self.terms: tuple[RewardTerm, ...] = tuple(terms)
        advice = "rollout.reward_worker other than none (fewer images in a call), " if full_batch else ""
        self._sizes = {
            term.name: ImagesPerCall(term.name, halves=not full_batch, advice=advice) for term in self.terms
        }

    @torch.no_grad()
    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        keep_bad: bool = False,
    ) -> Scores:
        """Scores a batch.

        Args:
            images: float32 ``[N, 3, H, W]`` in [0, 1].
            prompts: N texts.
            metadata: N mappings; None for N empty ones.
            keep_bad: notes numbers that are not finite, and all numbers of a reward that returns more or fewer than N,
                in `Scores.problems`; they become NaN, and so does the sum of their images.

        Raises:
            RewardError: a reward raised, or returned anything but N numbers, or without ``keep_bad`` a number that is
                not finite or a wrong number of numbers. ``images_index`` holds the positions of the images at fault.
            RewardMemoryError: a reward ran out of a GPU's memory, and fewer images in a call do not help.
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
        problems: dict[str, str] = {}

        def checked(name: str, values: Tensor, problem: RewardError | None) -> Tensor:
            if problem is not None:
                if not keep_bad:
                    raise problem
                problems[name] = str(problem)
            return values

        for term in self.terms:
            found = self._sizes[term.name].with_oom_fallback(
                count, images.device, partial(_score, term, images, prompts, metadata)
            )
            parts[term.name] = checked(term.name, *found)
            total += term.weight * scaled(parts[term.name].double(), term.range)
        # of an image with a bad part, that part is reported
        scored = torch.stack([part.isfinite() for part in parts.values()]).all(0)
        found = _finite("the weighted sum of the rewards", total.float(), prompts, among=scored)
        return Scores(checked("sum", *found), parts, problems)


def scaled(values: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Maps the values by the straight line that maps ``bounds`` to 0 and 1; None returns the values as they are."""
    if bounds is None:
        return values
    low, high = bounds
    return (values - low) / (high - low)


def _score(
    term: RewardTerm,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    size: int,
) -> tuple[Tensor, RewardError | None]:
    """Returns one term's values, float32 ``[N]`` on the CPU, NaN where they are bad, and the error about those.

    Each call has ``size`` images.
    """
    # a reward is called even without images
    starts = range(0, max(len(prompts), 1), max(size, 1))
    parts = [_call(term, images, prompts, metadata, slice(start, start + size)) for start in starts]
    values, problem = _finite(f"reward {term.name!r}", torch.cat([part for part, _ in parts]), prompts)
    return values, next((wrong for _, wrong in parts if wrong is not None), problem)


def _call(
    term: RewardTerm,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    rows: slice,
) -> tuple[Tensor, RewardError | None]:
    """Returns one call's values for some rows, float32 ``[n]`` on the CPU; NaN, with an error, for a wrong number."""
    name = f"reward {term.name!r}"
    texts = list(prompts[rows])
    count = len(texts)
    everything = range(rows.start, rows.start + count)
    missing = torch.full((count,), torch.nan)
    try:
        # copies: the images are also shown, saved, and scored by other rewards
        found = term.reward(images[rows].clone(), texts, [dict(entry) for entry in metadata[rows]])
    except CountError as error:
        return missing, RewardError(f"{name}: {error}", everything)
    except RewardError as error:
        raise RewardError(f"{name}: {error}", everything) from error
    except RewardMemoryError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise RewardError(f"{name} raised {_raised(error)}", everything) from error
    values = _as_tensor(found)
    if values is not None and values.shape == (count,):
        return values.to("cpu", torch.float32), None
    problem = RewardError(
        f"{name} returned {_described(found, values)}; allowed: a tensor, array or list of {count} number(s), one for "
        "each image",
        everything,
    )
    if values is None:
        raise problem
    return missing, problem


def _as_tensor(found: object) -> Tensor | None:
    """Converts what a reward returned to a tensor of real numbers of any shape; None if that is not possible."""
    try:
        if isinstance(found, list | tuple):
            if any(isinstance(item, str | bytes) for item in found):
                return None
            return torch.tensor([float(item) for item in found], dtype=torch.float64)
        values = found.detach() if isinstance(found, Tensor) else torch.as_tensor(found)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return None if values.is_complex() else values


def _finite(
    name: str, values: Tensor, prompts: Sequence[str], among: Tensor | None = None
) -> tuple[Tensor, RewardError | None]:
    """Replaces values that are not finite by NaN; returns them with an error about those in ``among`` (None: all)."""
    bad = ~values.isfinite()
    at_fault = (bad if among is None else bad & among).nonzero().flatten().tolist()
    if not at_fault:
        return values.masked_fill(bad, torch.nan), None
    numbers = ", ".join(f"{values[index]:g}" for index in at_fault[:_MOST_SHOWN])
    return values.masked_fill(bad, torch.nan), RewardError(
        f"{name} is not finite for {len(at_fault)} of {len(prompts)} image(s): {numbers} for "
        f"prompts {quoted(prompts, at_fault)}",
        at_fault,
    )


def shown(prompt: str) -> str:
    """Quotes a prompt for a message: on one line, and cut off if it is long."""
    return repr(one_line(prompt, _PROMPT_LENGTH))


def quoted(prompts: Sequence[str], positions: Sequence[int]) -> str:
    """Quotes the first of the prompts at some positions, each once, and says how many more there are."""
    return listed([shown(text) for text in dict.fromkeys(prompts[position] for position in positions)])


def listed(texts: Sequence[str]) -> str:
    """Lists the first of the texts, and says how many more there are."""
    more = len(texts) - _MOST_SHOWN
    return ", ".join(texts[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _raised(error: BaseException) -> str:
    """Describes an error of a reward, with the line of the reward that raised it, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)[1:2]
    place = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in frames)
    return f"{type(error).__name__}: {one_line(error)}{place}"


def _described(found: object, values: Tensor | None) -> str:
    """Describes what a reward returned; ``values`` is the same as a tensor, or None."""
    if values is not None:
        if values.ndim == 0:
            return "a single number"
        return f"{len(values)} number(s)" if values.ndim == 1 else f"values of shape {list(values.shape)}"
    if found is None:
        return "None"
    kind, dtype = type(found).__name__, getattr(found, "dtype", None)
    if isinstance(found, Mapping):
        return f"{kind} with the keys {one_line(', '.join(map(repr, found)), _PROMPT_LENGTH)}"
    if isinstance(found, tuple):
        return f"{kind} ({one_line(', '.join(type(item).__name__ for item in found), _PROMPT_LENGTH)})"
    if isinstance(found, list):
        kinds = dict.fromkeys(type(item).__name__ for item in found)
        return f"{kind} of {one_line(', '.join(kinds), _PROMPT_LENGTH)}"
    return kind if dtype is None else f"{kind} of {dtype}"
