from __future__ import annotations

import importlib.util
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfast.errors import ConfigError
from loopfast.rewards.models.noun_phrases import MOST_PHRASES, load_spacy, rule_phrases, spacy_phrases

# In the style of T2I-CompBench's categories color, shape and texture.
PHRASES = {
    # two objects with an attribute each
    "a green bench and a yellow bowl": ["a green bench", "a yellow bowl"],
    "an oblong cucumber and a teardrop plum.": ["an oblong cucumber", "a teardrop plum"],
    "rubber boots and fluffy clouds": ["rubber boots", "fluffy clouds"],
    "a red apple and yellow bananas": ["a red apple", "yellow bananas"],
    "a brown dog and a red orange": ["a brown dog", "a red orange"],
    "a red orange and green pears": ["a red orange", "green pears"],
    "A big set of keys and a small lock": ["A big set", "keys", "a small lock"],
    "a cubic block and a cylindrical soda can": ["a cubic block", "a cylindrical soda can"],
    "a diamond engagement ring on a spherical stand": ["a diamond engagement ring", "a spherical stand"],
    # attributes that are joined are one phrase
    "a black and white cat in a gray sink": ["a black and white cat", "a gray sink"],
    "A long, narrow kitchen with black and white floor tiles.": [
        "A long, narrow kitchen",
        "black and white floor tiles",
    ],
    "two white sheep, a black goat and a brown goat": ["two white sheep", "a black goat", "a brown goat"],
    # sentences
    "The leather wallet and fluffy keychain hang on the metallic hook.": [
        "The leather wallet",
        "fluffy keychain",
        "the metallic hook",
    ],
    "The glass vase and metallic frame display the wooden flowers.": [
        "The glass vase",
        "metallic frame",
        "the wooden flowers",
    ],
    "The brown dog was lying quietly on the green mat.": ["The brown dog", "the green mat"],
    "The round knob and the square plate were attached to the door.": [
        "The round knob",
        "the square plate",
        "the door",
    ],
    "A man in a gray jacket standing next to a black dog": ["A man", "a gray jacket", "a black dog"],
    "A dining area features a wood table.": ["A dining area", "a wood table"],
    "the defining features of the house": ["the defining features", "the house"],
    "the clock with a red roof reads 11:44": ["the clock", "a red roof"],
    "The tall building in the city": ["The tall building", "the city"],
    "a lamp on top of the stand to the left": ["a lamp", "the stand"],
    # nothing to ask about
    "": [],
    "... 123 !": [],
    "running on it": [],
}


@pytest.mark.parametrize("prompt", PHRASES)
def test_rules_find_the_phrases(prompt: str) -> None:
    assert rule_phrases(prompt) == PHRASES[prompt]


def test_the_first_eight_count() -> None:
    prompt = ", ".join(f"a {letter}x" for letter in string.ascii_lowercase)
    assert rule_phrases(prompt) == [f"a {letter}x" for letter in string.ascii_lowercase[:MOST_PHRASES]]


@given(st.one_of(st.text(), st.lists(st.sampled_from(" ".join(PHRASES).split())).map(" ".join)))
def test_phrases_of_any_text_are_its_words_in_order(prompt: str) -> None:
    """Nothing is made up, nothing is empty, and it ends."""
    letters = iter("".join(prompt.split()))
    for phrase in rule_phrases(prompt):
        assert phrase.strip()
        assert all(letter in letters for letter in "".join(phrase.split()))


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_without_spacy_its_phrases_name_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'loopfast\[spacy\]'"):
        spacy_phrases("a cat")


@pytest.mark.skipif(importlib.util.find_spec("spacy") is None, reason="needs the extra spacy")
@pytest.mark.skipif(
    importlib.util.find_spec("en_core_web_sm") is not None, reason="spaCy's model is installed"
)
def test_without_its_model_spacy_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match="python -m spacy download en_core_web_sm"):
        load_spacy()


@pytest.mark.skipif(
    importlib.util.find_spec("spacy") is None or importlib.util.find_spec("en_core_web_sm") is None,
    reason="needs the extra spacy and its model en_core_web_sm",
)
def test_spacy_finds_the_benchmarks_phrases() -> None:
    assert spacy_phrases("a green bench and a blue bowl") == ["a green bench", "a blue bowl"]
    assert spacy_phrases("a green apple on the left of a blue vase") == ["a green apple", "a blue vase"]
