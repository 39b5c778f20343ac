"""T2I-CompBench's score of numeracy: the objects in the image against the numbers in the prompt.

The rules are those of the benchmark's code (arXiv 2307.06350; ``UniDet_eval/numeracy_eval.py``); the detector is
another one, see `loopfast.rewards.models.detection`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import ConfigError, RewardError
from loopfast.rewards.base import shown
from loopfast.rewards.models.detection import OWLV2, Detection, detector_loader, without_same
from loopfast.rewards.models.pretrained import Placement, ScoreBatch, pretrained

__all__ = ["OBJECTS", "count_objects", "count_score", "counted_objects", "numeracy"]

_OBJECTS = """
airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy bread
butterfly cake camel camera candle car cat chair chicken clock computer couch cow cup deer desk dog
drum duck egg fish flag frog giraffe girl goldfish guitar hamburger helicopter helmet horse key kite
knife lamp lemon man microphone microwave mouse paddle painting peach pear pen person phone pig
pillow plate printer rabbit refrigerator sheep ship shrimp sink sofa stool strawberry suitcase swan
table television tent tomato toy train truck turtle vase woman
"""
OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())
"""The nouns that the benchmark counts, in the singular."""

_DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"a": 1, "an": 1, **{word: number for number, word in enumerate(_DIGITS, start=1)}}
_IRREGULAR = {"knife": "knives", "man": "men", "mouse": "mice", "person": "people", "woman": "women"}
_IRREGULAR |= {name: name for name in ("deer", "fish", "goldfish", "sheep", "shrimp")}
_CONTAINED = 0.9  # share of a box's area in another box of its name from which they are one object


def counted_objects(prompt: str, objects: Iterable[str] = OBJECTS) -> list[tuple[str, int]]:
    """Returns the objects that a prompt counts, in the singular, each with its number, in their order.

    An object is counted if its name, of one or two words, follows a number in words or digits, or an article. Other
    nouns after an article ("created a relaxing atmosphere") are not counted. ``objects`` are names in the singular.
    """
    names = {form: name for name in objects for form in (name, _plural(name))}
    words = re.findall(r"[\w'-]+", prompt.lower())
    found = []
    for index, word in enumerate(words):
        number = int(word) if word.isdecimal() else _NUMBERS.get(word)
        if number is None:
            continue
        for length in (2, 1):
            name = names.get(" ".join(words[index + 1 : index + 1 + length]))
            if name is not None:
                found.append((name, number))
                break
    return found


def count_objects(found: Sequence[Detection]) -> dict[str, int]:
    """Returns the number of objects of each name, without boxes that lie within a more certain one of their name."""
    kept = without_same(found, lambda a, b: a.overlap(b) > _CONTAINED * min(a.area, b.area))
    return Counter(one.name for one in kept)


def count_score(wanted: Sequence[tuple[str, int]], counts: Mapping[str, int]) -> float:
    """Returns the benchmark's score of an image, in [0, 1]: the mean over objects, ½ if found, 1 if in that number."""
    points = sum(0.5 + 0.5 * (counts[name] == number) for name, number in wanted if counts.get(name, 0) > 0)
    return points / len(wanted)


@pretrained
def numeracy(
    place: Placement,
    weights: str = OWLV2,
    revision: str | None = None,
    threshold: float = 0.2,
    objects: Sequence[str] = (),
) -> Callable[[], ScoreBatch]:
    """Score of the objects that the prompt counts, in [0, 1]: whether they are in the image, and in that number.

    The objects are read from the metadata's ``objects``, such as ``{zebra: 2}``, if given, else from the prompt.
    A prompt that counts no known object is an error.

    Args:
        weights: an OWL-ViT or OWLv2 detector, a folder or a hub name.
        objects: names, in the singular, to count besides the benchmark's nouns.
    """
    if isinstance(objects, str) or not all(isinstance(name, str) and name.strip() for name in objects):
        raise ConfigError(f"reward 'numeracy': objects: found {objects!r}, allowed: a list of nouns")
    load_detector = detector_loader(place, weights, revision, threshold)
    known = (*OBJECTS, *(name.strip().lower() for name in objects))

    def load() -> ScoreBatch:
        detector = load_detector()

        def score(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            wanted = [_required(p, entry, known) for p, entry in zip(prompts, metadata, strict=True)]
            found = detector(images, [[name for name, _ in pairs] for pairs in wanted])
            return torch.tensor(
                [
                    count_score(pairs, count_objects(detections))
                    for pairs, detections in zip(wanted, found, strict=True)
                ]
            )

        return score

    return load


def _required(prompt: str, entry: Mapping[str, Any], known: Iterable[str]) -> list[tuple[str, int]]:
    if "objects" in entry:
        objects = entry["objects"]
        if not isinstance(objects, Mapping) or not all(
            isinstance(name, str) and name.strip() and type(number) is int and number > 0
            for name, number in objects.items()
        ):
            raise RewardError(
                f"prompt {shown(prompt)}: metadata objects: found {objects!r}, allowed: whole numbers above 0 by name"
            )
        found = list(objects.items())
    else:
        found = counted_objects(prompt, known)
    if not found:
        raise RewardError(
            f"no known object is counted in the prompt {shown(prompt)}; known: the benchmark's {len(OBJECTS)} nouns "
            f"and those of the option objects"
        )
    return found


def _plural(name: str) -> str:
    first, space, last = name.rpartition(" ")
    if last in _IRREGULAR:
        plural = _IRREGULAR[last]
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        plural = f"{last[:-1]}ies"
    elif last.endswith(("ch", "sh", "s", "x", "z")) or last == "tomato":
        plural = f"{last}es"
    else:
        plural = f"{last}s"
    return f"{first}{space}{plural}"
