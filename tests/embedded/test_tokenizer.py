from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from benchmarks.embedded_model.tokenizer import END, MAX_LENGTH, START, vocabulary, words, write_tokenizer
from loopfast.embedded import world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "new" / "folder"
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("word", sorted(set(words())))
def test_each_word_of_the_world_is_one_token(tokenizer: CLIPTokenizer, word: str) -> None:
    vocab, _ = vocabulary()
    assert tokenizer(word).input_ids == [vocab[START], vocab[f"{word}</w>"], vocab[END]]


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_captions_are_their_words_and_fit(tokenizer: CLIPTokenizer, category: str) -> None:
    vocab, _ = vocabulary()
    texts = [caption.text for caption in world.compositions(category)]
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert ids == [vocab[START], *(vocab[f"{word}</w>"] for word in text.split()), vocab[END]]
        assert len(ids) <= MAX_LENGTH


def test_padding_and_truncation(tokenizer: CLIPTokenizer) -> None:
    vocab, _ = vocabulary()
    assert tokenizer.model_max_length == MAX_LENGTH
    ids = tokenizer(["", "a red " * 20], padding="max_length", truncation=True).input_ids
    assert ids[0] == [vocab[START]] + [vocab[END]] * (MAX_LENGTH - 1)
    assert len(ids[1]) == MAX_LENGTH
    assert ids[1][-1] == vocab[END]


def test_other_texts_are_spelled(tokenizer: CLIPTokenizer) -> None:
    vocab, _ = vocabulary()
    ids = tokenizer("Wholly different: {words}!").input_ids
    assert len(ids) > 10
    assert vocab[END] not in ids[1:-1]  # nothing is unknown
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "whollydifferent:{words}!"


def test_case_does_not_matter(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer("A RED Circle").input_ids == tokenizer("a red circle").input_ids


def test_only_the_classic_files_are_written(folder: Path) -> None:
    """transformers 4 and 5 both read these; a `tokenizer.json` would be another matter."""
    assert sorted(path.name for path in folder.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "CLIPTokenizer"
    vocab = json.loads((folder / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert vocab == vocabulary()[0]
    rules = (folder / "merges.txt").read_text().splitlines()
    assert [tuple(rule.split()) for rule in rules[1:]] == vocabulary()[1]
