"""The embedded model's tokenizer: CLIP's byte-pair encoding over the few words of the embedded world.

Only the classic files (``vocab.json``, ``merges.txt``) are written: transformers 4 and 5 both read those.
"""

from __future__ import annotations

import json
from pathlib import Path

from loopfast.embedded.world import COLORS, NUMBERS, SHAPES, TEXTURES, plural

MAX_LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Returns every word that a caption can contain."""
    plurals = [plural(shape) for shape in SHAPES]
    joints = ["a", "an", "and", "left", "right", "of", "above", "below"]
    return [*COLORS, *SHAPES, *plurals, *TEXTURES, *NUMBERS, *joints]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns token ids and merge rules: each word of the world is one token, and other ASCII text still encodes."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words():
        # build each word from its end: the suffixes of different words then never compete for a letter
        pieces = [*word[:-1], word[-1] + "</w>"]
        suffix = pieces.pop()
        while pieces:
            pair = (pieces.pop(), suffix)
            suffix = "".join(pair)
            if pair not in merges:
                merges.append(pair)
                tokens.append(suffix)
    return {token: index for index, token in enumerate([*tokens, START, END])}, merges


def write_tokenizer(directory: Path) -> dict[str, int]:
    """Writes the tokenizer's files into a folder and returns its vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    (directory / "vocab.json").write_text(json.dumps(vocab, indent=0) + "\n", "utf-8")
    rules = "\n".join(f"{left} {right}" for left, right in merges)
    (directory / "merges.txt").write_text(f"#version: 0.2\n{rules}\n", "utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return vocab
