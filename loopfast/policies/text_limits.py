"""The number of tokens that the text encoders of a pipeline read, and the prompts that are longer.

A text encoder ignores all text beyond its limit, so prompts that differ only there are the same to the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class TextLimit:
    """The number of tokens of a prompt that a text encoder reads.

    Attributes:
        encoder: the encoder's kind, ``CLIP`` or ``T5``.
        tokens: the number of tokens, with the marks of beginning and end that the tokenizer adds.
        tokenizer: the tokenizer of transformers.
        lower: the pipeline turns prompts into lower case before they are tokenized.
    """

    encoder: str
    tokens: int
    tokenizer: Any
    lower: bool = False

    def ids(self, prompts: Sequence[str], *, cut: bool) -> list[list[int]]:
        """Returns the token ids of each of P prompts: all, or with ``cut`` only those that are read."""
        if not prompts:
            return []
        texts = [self._lowered(prompt) for prompt in prompts]
        options = {"verbose": False, "return_attention_mask": False, **(self._length if cut else {})}
        found: list[list[int]] = self.tokenizer(texts, **options)["input_ids"]
        return found

    def last_words(self, prompt: str) -> str:
        """Returns the last words of a prompt that are read, in 40 characters at most."""
        text = self._lowered(prompt)
        if self.tokenizer.is_fast:
            places = self.tokenizer(text, return_offsets_mapping=True, **self._length)["offset_mapping"]
            read = text[: max(end for _, end in places)]
        else:
            read = self.tokenizer.decode(self.ids([prompt], cut=True)[0], skip_special_tokens=True)
        shown = " ".join(read.split()[-5:])[-40:]
        return shown if shown == read else f"… {shown}"

    @property
    def _length(self) -> dict[str, Any]:
        return {"truncation": True, "max_length": self.tokens}

    def _lowered(self, prompt: str) -> str:
        return prompt.lower() if self.lower else prompt


@dataclass(frozen=True)
class Cut:
    """A prompt at a position that a text encoder does not read to its end, with the number of its tokens."""

    index: int
    limit: TextLimit
    prompt: str
    tokens: int

    @property
    def end(self) -> str:
        """The last words that the encoder reads."""
        return self.limit.last_words(self.prompt)

    def __str__(self) -> str:
        return f"{self.tokens} tokens, of which {self.limit.encoder} reads {self.limit.tokens}, up to {self.end!r}"


@dataclass(frozen=True)
class Reading:
    """The prompts that the text encoders of a model cut.

    Attributes:
        count: the number of prompts.
        cuts: the cut prompts, by encoder and then in the prompts' order.
        twins: the position of each prompt that is the same to the model as an earlier, different one, with the position
            of the earlier one.
    """

    count: int
    cuts: tuple[Cut, ...]
    twins: Mapping[int, int]

    @property
    def warning(self) -> str | None:
        """A sentence about the cut prompts that follows "prompts <source>: "; None if none is cut."""
        if not self.cuts:
            return None
        by_limit = Counter((cut.limit.encoder, cut.limit.tokens) for cut in self.cuts)
        each = ", ".join(f"{encoder} at {tokens} tokens: {n}" for (encoder, tokens), n in by_limit.items())
        twins = f"; {len(self.twins)} then the same to the model as an earlier one" if self.twins else ""
        number = len({cut.index for cut in self.cuts})
        return (
            f"{number} of {self.count} {'is' if number == 1 else 'are'} longer than a text encoder reads and cut "
            f"({each}), the first after {self.cuts[0].end!r}{twins}"
        )


def read_prompts(limits: Sequence[TextLimit], prompts: Sequence[str]) -> Reading:
    """Finds the prompts that text encoders with these limits cut."""
    whole = [limit.ids(prompts, cut=False) for limit in limits]
    # a prompt that fills an encoder may equal the read part of a longer one
    rows = list(zip(limits, whole, strict=True))
    full = [
        index for index in range(len(prompts)) if any(len(ids[index]) >= limit.tokens for limit, ids in rows)
    ]
    texts = [prompts[index] for index in full]
    read = [dict(zip(full, limit.ids(texts, cut=True), strict=True)) for limit in limits]
    cuts = tuple(
        Cut(index, limit, prompts[index], len(all_ids[index]))
        for limit, all_ids in rows
        for index in full
        if len(all_ids[index]) > limit.tokens
    )
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    twins = {}
    for index in full:
        earlier = first.setdefault(tuple(tuple(ids[index]) for ids in read), index)
        if any(all_ids[index] != all_ids[earlier] for all_ids in whole):
            twins[index] = earlier
    return Reading(len(prompts), cuts, twins)


def encoder_of(tokenizer: str) -> str:
    """Returns the name of the text encoder that belongs to a tokenizer."""
    return tokenizer.replace("tokenizer", "text_encoder")
