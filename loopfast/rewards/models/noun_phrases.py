"""The noun phrases of a prompt, which the questions of `blip_vqa` are about.

T2I-CompBench (arXiv 2307.06350, `BLIPvqa_eval/BLIP_vqa.py`) takes the first eight noun chunks that spaCy's parser
finds, without a few that name a place; so does `spacy_phrases`. `rule_phrases` is a splitter for such captions that
needs no package: determiners open a phrase; prepositions, pronouns, verbs and punctuation close one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from loopfast.errors import ConfigError, MissingExtraError

__all__ = ["MOST_PHRASES", "SPLITTERS", "load_spacy", "rule_phrases", "spacy_phrases"]

MOST_PHRASES = 8
"""Number of phrases of a prompt that count, from its beginning; the benchmark's ``np_num``."""

_PLACES = {"top", "the side", "the left", "the right"}
_SPACY_MODEL = "en_core_web_sm"

_WORD = re.compile(r"[^\W\d_][\w'’-]*|\d[\w:.,]*\w|\d|[^\w\s]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("""
    a an the this these those each every another any some several many few no its his her their my our your
    one two three four five six seven eight nine ten eleven twelve
""")
_PREPOSITIONS = _words("""
    about above across against along amid among around as at atop before behind below beneath beside besides between
    beyond by down during for from in inside into like near next of off on onto out outside over past through to
    toward towards under underneath until up upon via with within without
""")
_OTHER_CLOSERS = _words("""
    after although because but if than then though unless when where whereas while
    both he her him i it me she that them there they us we what which who whom whose you
    am are be been being could did do does had has have is may might must not should was were will would
    again also away back here just left nearby right together too very
""")
_JOINS = frozenset({"and", "or", "&", ","})
_COLORS = _words("""
    amber beige black blue bronze brown colorful cream crimson cyan dark gold golden gray green grey indigo light
    magenta maroon navy orange pale pink purple red scarlet silver tan teal turquoise violet white whitish yellow
""")
_ADJECTIVES = _COLORS | _words("""
    big broad circular conical cubic curved cylindrical enormous flat giant gigantic heavy hexagonal huge large
    little long massive medium miniature narrow oblong octagonal oval pentagonal pointed pyramidal rectangular round
    short slim small spherical square straight tall thick thin tiny triangular wide
    bumpy ceramic cotton crisp fabric fluffy furry fuzzy glossy hard leather matte metal metallic plastic polished
    rough rubber sharp shiny silky slick smooth soft sparkly spiky sticky velvet wood wooden woolen
    antique bare beautiful bright clean clear closed cold cozy dirty dry empty fresh full happy hot modern new old
    open rustic sad stainless striped vintage warm wet young
""")
_VERBS = _words("""
    attach attaches attract attracts attracted ate beat beats boil boils carry carries contain contains contained
    cook cooks decorate decorates displayed drove eat eats flash flashes flew float floats grew grow grows hang hangs
    held hold holds hung keep keeps kept laid lay lean leans led lie lies made make makes mix mixes pound pounds
    provide provides provided ran read reads rest rests ride rides rode run runs sat serve serves shine shines shone
    sit sits stir stirs stood surround surrounds swam swim swims took wear wears wore
""")
_VERBS_OR_NOUNS = _words("""
    display displays drink drinks drive drives feature features fly flies look looks play plays show shows stand
    stands use uses walk walks
""")
_NOUNS_LIKE_PARTICIPLES = _words("""
    awning bed bedding being bread building ceiling clothing covering dressing drawing earring evening feed flooring
    frosting icing king landing lightning morning opening painting pudding railing reed ring seating seed setting
    shed sibling sled spring steed string swing topping wedding weed wing wiring
""")
_NOT_ADVERBS = _words("""
    belly bubbly bully butterfly curly dragonfly family firefly friendly holly jelly likely lily lovely only smelly
    unlikely wooly
""")
_ADVERB = re.compile(r"\w{3,}ly")


def rule_phrases(prompt: str) -> list[str]:
    """Returns the noun phrases that the rules find, at most `MOST_PHRASES`, as they are written in the prompt."""
    words = [match.group() for match in _WORD.finditer(prompt)]
    phrases: list[str] = []
    position = 0
    while position < len(words) and len(phrases) < MOST_PHRASES:
        phrase, position = _phrase(words, position)
        text = " ".join(phrase).replace(" ,", ",")
        named = any(word[0].isalpha() and word.lower() not in _DETERMINERS for word in phrase)
        if named and text.lower() not in _PLACES:
            phrases.append(text)
    return phrases


def _phrase(words: list[str], start: int) -> tuple[list[str], int]:
    """Returns the phrase that begins at ``start``, empty if none does, and the position to continue from."""
    phrase: list[str] = []
    named = 0  # words so far that count as nouns
    position = start
    while position < len(words):
        word = words[position].lower()
        following = words[position + 1].lower() if position + 1 < len(words) else "."
        if word in _DETERMINERS:
            if phrase:
                # "glass jar hold the screws": the word between a noun and a determiner is a verb
                return (phrase[:-1] if named > 1 else phrase), position
        elif word in _JOINS:
            # "black and white cat", "a long, narrow kitchen": adjectives may be joined, phrases are not
            if not phrase or named or following in _DETERMINERS or following in _JOINS or _closes(following):
                return phrase, position + 1
        elif _closes(word) or _is_verb(word, following, after_noun=named > 0, first=not phrase):
            return phrase, position + 1
        elif word not in _ADJECTIVES or (word == "orange" and phrase and phrase[-1].lower() in _COLORS):
            named += 1
        phrase.append(words[position])
        position += 1
    return phrase, position


def _closes(word: str) -> bool:
    if word in _PREPOSITIONS or word in _OTHER_CLOSERS or not word[0].isalnum():
        return True
    return _ADVERB.fullmatch(word) is not None and word not in _NOT_ADVERBS and word not in _ADJECTIVES


def _is_verb(word: str, following: str, *, after_noun: bool, first: bool) -> bool:
    """True if a word is a verb, or a participle such as "parked", which describes the noun before it."""
    if word in _VERBS_OR_NOUNS:
        return after_noun and (following in _DETERMINERS or following in _ADJECTIVES)
    if not after_noun and not first:
        return False
    # a participle that a noun follows is an adjective or a noun
    if word.endswith(("ed", "ing")) and word not in _NOUNS_LIKE_PARTICIPLES and word not in _ADJECTIVES:
        return word in _VERBS or following in _DETERMINERS or _closes(following)
    return word in _VERBS


def spacy_phrases(prompt: str) -> list[str]:
    """Returns the noun chunks that spaCy's ``en_core_web_sm`` finds, at most `MOST_PHRASES`, as the benchmark does."""
    chunks = [chunk.text for chunk in load_spacy()(prompt).noun_chunks]
    return [chunk for chunk in chunks if chunk not in _PLACES][:MOST_PHRASES]


@functools.cache
def load_spacy() -> Callable[[str], Any]:
    """Loads spaCy's pipeline ``en_core_web_sm``, once.

    Raises:
        ConfigError: spaCy or the pipeline is not installed.
    """
    feature = "blip_vqa with phrases=spacy"
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise ConfigError(str(MissingExtraError(feature, "spacy", error.name))) from error
    try:
        pipeline: Callable[[str], Any] = spacy.load(_SPACY_MODEL)
    except OSError as error:
        raise ConfigError(
            f"{feature} needs spaCy's English model: python -m spacy download {_SPACY_MODEL}"
        ) from error
    return pipeline


SPLITTERS: dict[str, Callable[[str], list[str]]] = {"rules": rule_phrases, "spacy": spacy_phrases}
"""The splitters by the values of the option ``phrases``."""
