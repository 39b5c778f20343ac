"""The embedded world: captions of colored shapes, their compositions, and the split into training and held-out.

A caption names one kind of object in a number, or two objects. The six categories follow those of T2I-CompBench
(arXiv 2307.06350): attribute binding (``color``, ``shape``, ``texture``), ``spatial``, ``numeracy`` and ``complex``.
A *composition* is the meaning of a caption, without the order of its objects. About a quarter of each category's
compositions are kept out of all training, here and in pretraining: the smaller part of them for choosing settings
(``validation``), the rest for measuring results (``heldout``).
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass
from functools import cache

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.12, 0.62, 0.18),
    "blue": (0.14, 0.28, 0.88),
    "yellow": (0.96, 0.82, 0.08),
    "purple": (0.56, 0.16, 0.72),
    "orange": (0.96, 0.48, 0.06),
    "cyan": (0.08, 0.76, 0.82),
    "black": (0.10, 0.10, 0.10),
}
BACKGROUND: tuple[float, float, float] = (0.96, 0.96, 0.96)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "diamond")
# a cross has no room for a texture
TEXTURED_SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond")
TEXTURES: tuple[str, ...] = ("filled", "outlined", "striped")
RELATIONS: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
CATEGORIES: tuple[str, ...] = ("color", "shape", "texture", "spatial", "numeracy", "complex")

SPLITS: tuple[str, ...] = ("train", "validation", "heldout")
VALIDATION_SHARE = 0.07
HELDOUT_SHARE = 0.18
COMPLEX_COMPOSITIONS = 600


@dataclass(frozen=True, order=True)
class Item:
    """One object as a caption names it; ``texture`` is None if the caption names none."""

    color: str
    shape: str
    texture: str | None = None

    def phrase(self) -> str:
        """Returns the item with its article, such as "an outlined red circle"."""
        words = f"{self.texture} {self.color} {self.shape}" if self.texture else f"{self.color} {self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """Returns the plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


@dataclass(frozen=True)
class Caption:
    """The meaning of a prompt: ``items`` in the order named, ``count`` copies of a single item, a ``relation``."""

    category: str
    items: tuple[Item, ...]
    count: int = 1
    relation: str | None = None

    @property
    def text(self) -> str:
        """The caption as a prompt."""
        if self.count > 1:
            number = next(word for word, n in NUMBERS.items() if n == self.count)
            item = self.items[0]
            return f"{number} {item.color} {plural(item.shape)}"
        if len(self.items) == 1:
            return self.items[0].phrase()
        return f"{self.items[0].phrase()} {self.relation or 'and'} {self.items[1].phrase()}"

    def objects(self) -> tuple[Item, ...]:
        """Returns the objects that a faithful picture shows."""
        return self.items * self.count

    def reversed(self) -> Caption:
        """Returns the same composition, with its other object first."""
        relation = RELATIONS[self.relation] if self.relation else None
        return Caption(self.category, self.items[::-1], self.count, relation)

    def composition(self) -> Caption:
        """Returns the one caption that stands for all captions of this composition."""
        if len(self.items) < 2:
            return self
        if self.relation:
            return self if self.relation in ("left of", "above") else self.reversed()
        return self if self.items[0] <= self.items[1] else self.reversed()


def _hash(caption: Caption) -> int:
    return int.from_bytes(hashlib.sha256(caption.composition().text.encode()).digest()[:8], "big")


def split_of(caption: Caption) -> str:
    """Returns the split of the caption's composition. Single objects are always for training."""
    position = _hash(caption) / 2**64
    if len(caption.objects()) < 2 or position >= VALIDATION_SHARE + HELDOUT_SHARE:
        return "train"
    return "validation" if position < VALIDATION_SHARE else "heldout"


@cache
def compositions(category: str) -> tuple[Caption, ...]:
    """Returns every composition of a category, in a fixed shuffled order.

    Raises:
        ValueError: the category does not exist.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)} and all")
    if category == "numeracy":
        singles = itertools.product(SHAPES, COLORS, NUMBERS.values())
        found = [Caption(category, (Item(color, shape),), count) for shape, color, count in singles]
    else:
        textured, related = category in ("texture", "complex"), category in ("spatial", "complex")
        one_color = category in ("shape", "texture", "spatial")
        pairs = itertools.product(
            itertools.permutations(TEXTURED_SHAPES if textured else SHAPES, 2),
            itertools.permutations(TEXTURES, 2) if textured else [(None, None)],
            zip(COLORS, COLORS, strict=True) if one_color else itertools.permutations(COLORS, 2),
            ("left of", "above") if related else (None,),
        )
        found = [
            Caption(category, (Item(c, s, x), Item(d, t, y)), relation=relation)
            for (s, t), (x, y), (c, d), relation in pairs
        ]
    unique = sorted({caption.composition() for caption in found}, key=_hash)
    if category == "complex":
        # a sample over the whole range of hashes, so that its held-out share is that of the other categories
        unique = unique[:: len(unique) // COMPLEX_COMPOSITIONS][:COMPLEX_COMPOSITIONS]
    random.Random(0).shuffle(unique)
    return tuple(unique)


@cache
def prompts(category: str, split: str = "train") -> tuple[Caption, ...]:
    """Returns the captions of a category (or of ``all``) in one split, each composition once.

    Raises:
        ValueError: the category or the split does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if category == "all":
        columns = [prompts(name, split) for name in CATEGORIES]
        mixed = itertools.chain.from_iterable(itertools.zip_longest(*columns))
        return tuple(caption for caption in mixed if caption is not None)
    chosen = (caption for caption in compositions(category) if split_of(caption) == split)
    # half of them begin with the other object, by a bit of the hash that the split does not use
    return tuple(c.reversed() if len(c.items) > 1 and _hash(c) & 1 else c for c in chosen)


def parse(text: str) -> Caption:
    """Parses a caption of this world; the inverse of `Caption.text`.

    Raises:
        ValueError: the text is not such a caption.
    """
    words = text.strip().lower().rstrip(".")
    try:
        first, _, rest = words.partition(" ")
        if first in NUMBERS:
            color, shapes = rest.split(" ")
            shape = {plural(shape): shape for shape in SHAPES}[shapes]
            return Caption("numeracy", (_item([color, shape]),), count=NUMBERS[first])
        for joint in ("and", *RELATIONS):
            left, found, right = words.partition(f" {joint} ")
            if found:
                items = (_phrase(left), _phrase(right))
                relation = None if joint == "and" else joint
                return Caption(_category(items, relation), items, relation=relation)
        return Caption("color", (_phrase(words),))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{text!r} is not a caption of the embedded world, such as 'a red circle and a blue square' or "
            f"'three green triangles'"
        ) from error


def _item(words: list[str]) -> Item:
    texture = words.pop(0) if words[0] in TEXTURES else None
    color, shape = words
    if color not in COLORS or shape not in SHAPES:
        raise KeyError(color)
    return Item(color, shape, texture)


def _phrase(text: str) -> Item:
    article, *words = text.split(" ")
    if article not in ("a", "an") or not words:
        raise KeyError(article)
    return _item(words)


def _category(items: tuple[Item, Item], relation: str | None) -> str:
    textured = any(item.texture for item in items)
    if relation:
        return "complex" if textured else "spatial"
    if textured:
        return "texture"
    return "shape" if items[0].color == items[1].color else "color"
