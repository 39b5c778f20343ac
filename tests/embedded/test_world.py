from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.embedded_model.tokenizer import words
from loopfast.embedded import world
from loopfast.embedded.world import CATEGORIES, COLORS, SHAPES, SPLITS, TEXTURES, Caption, Item

EVERY = [caption for category in CATEGORIES for caption in world.compositions(category)]


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_caption_is_understood_as_it_was_meant(category: str) -> None:
    for caption in world.compositions(category):
        for said in (caption, caption.reversed()):
            assert world.parse(said.text) == said


@given(
    st.sampled_from(list(COLORS)),
    st.sampled_from(SHAPES),
    st.sampled_from([None, *TEXTURES]),
)
def test_a_single_object_is_understood(color: str, shape: str, texture: str | None) -> None:
    caption = Caption("color", (Item(color, shape, texture),))
    assert world.parse(caption.text) == caption
    assert world.parse(f"  {caption.text.upper()}. ") == caption


def test_captions_read_as_english() -> None:
    pair = (Item("orange", "circle"), Item("blue", "cross", "outlined"))
    assert Caption("color", pair).text == "an orange circle and an outlined blue cross"
    assert Caption("spatial", pair, relation="left of").text == (
        "an orange circle left of an outlined blue cross"
    )
    assert Caption("numeracy", (Item("red", "cross"),), count=3).text == "three red crosses"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a cat",
        "red circle",
        "a red circle and",
        "a red circle and a blue",
        "a pink circle and a blue square",
        "three red circle",
        "five red circles",
        "two red crosss",
        "a red circle beside a blue square",
        "a red circle and a blue square and a green cross",
        "a dotted red circle",
    ],
)
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a caption of the embedded world") as refused:
        world.parse(text)
    assert repr(text) in str(refused.value)


@given(st.lists(st.sampled_from([*words(), "cat", "", "A"]), max_size=9))
def test_any_text_is_understood_or_refused(said: list[str]) -> None:
    text = " ".join(said)
    try:
        caption = world.parse(text)
    except ValueError:
        return
    assert world.parse(caption.text) == caption


@given(st.sampled_from(EVERY))
def test_a_composition_does_not_depend_on_the_order_of_naming(caption: Caption) -> None:
    said = caption.reversed()
    assert said.composition() == caption.composition() == caption.composition().composition()
    assert world.split_of(said) == world.split_of(caption)


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_share_no_composition(category: str) -> None:
    splits = [{caption.composition() for caption in world.prompts(category, split)} for split in SPLITS]
    assert all(splits)
    assert set.union(*splits) == set(world.compositions(category))
    assert sum(map(len, splits)) == len(world.compositions(category))


def test_no_text_is_in_two_splits_in_any_order_of_naming() -> None:
    owner: dict[str, str] = {}
    for split in SPLITS:
        for caption in world.prompts("all", split):
            for text in {caption.text, caption.reversed().text}:
                assert owner.setdefault(text, split) == split


def test_there_is_enough_to_learn_from() -> None:
    sizes = {split: len(world.prompts("all", split)) for split in SPLITS}
    assert sizes["train"] > 1000
    total = sum(sizes.values())
    assert sizes["validation"] / total == pytest.approx(world.VALIDATION_SHARE, abs=0.02)
    assert sizes["heldout"] / total == pytest.approx(world.HELDOUT_SHARE, abs=0.03)
    for category in ("color", "spatial", "texture", "complex"):
        assert len(world.prompts(category)) > 200


def test_all_mixes_the_categories_from_its_start() -> None:
    everything = world.prompts("all")
    assert [caption.category for caption in everything[: len(CATEGORIES)]] == list(CATEGORIES)
    assert sorted(c.text for c in everything) == sorted(
        c.text for category in CATEGORIES for c in world.prompts(category)
    )


def test_single_objects_are_for_training() -> None:
    for color in COLORS:
        for shape in SHAPES:
            assert world.split_of(Caption("color", (Item(color, shape),))) == "train"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown category 'colour'.*color, shape.*all"):
        world.prompts("colour")
    with pytest.raises(ValueError, match=r"unknown split 'test'.*train, validation, heldout"):
        world.prompts("color", "test")
