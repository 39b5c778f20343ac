from __future__ import annotations

from pathlib import Path

import pytest

from loopfast.errors import ConfigError, MissingExtraError
from loopfast.prompts import Prompt, load_prompts

try:
    import datasets
except ImportError:
    datasets = None

needs_datasets = pytest.mark.skipif(datasets is None, reason="needs datasets")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with nothing of the hub to be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.skipif(datasets is not None, reason="datasets is installed")
def test_without_the_library_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"datasets:some/name.* pip install 'loopfast\[datasets\]'"):
        load_prompts("datasets:some/name")


@needs_datasets
def test_folder_that_was_saved(home: Path) -> None:
    table = datasets.Dataset.from_dict(
        {
            "Prompt": ["a cat", "", "a dog"],
            "legs": [4, 0, 4],
            "tags": [["x"], [], []],
            "raw": [b"1", b"2", b"3"],
        }
    )
    table.save_to_disk("one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk("two")
    cat, dog = Prompt("a cat", {"legs": 4, "tags": ["x"]}), Prompt("a dog", {"legs": 4, "tags": []})
    found = load_prompts("datasets:one")
    assert found == [cat, dog]
    assert (found.place(1), found.invisible) == ("row 3", 1)
    assert load_prompts(f"datasets:{home}/two") == [cat, dog]
    assert load_prompts("datasets:./two:test") == [cat]
    with pytest.raises(ConfigError, match="no split 'val'; found: 'train', 'test'"):
        load_prompts("datasets:two:val")
    with pytest.raises(ConfigError, match="no split 'test'; the folder holds one dataset"):
        load_prompts("datasets:one:test")


@needs_datasets
# as a name, csv is one of the library's readers of files
@pytest.mark.parametrize("folder", ["some", "csv"])
def test_folder_of_files(home: Path, folder: str) -> None:
    (home / folder).mkdir()
    (home / folder / "train.jsonl").write_text(
        '{"text": "a cat", "tag": "x"}\n{"text": "a dog", "tag": "y"}\n'
    )
    assert load_prompts(f"datasets:{folder}") == [
        Prompt("a cat", {"tag": "x"}),
        Prompt("a dog", {"tag": "y"}),
    ]
    with pytest.raises(ConfigError, match='cannot be loaded: Unknown split "test"'):
        load_prompts(f"datasets:{folder}:test")


@needs_datasets
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("captions", "no column is named prompt or text; found: 'caption'"),
        ("numbers", "the column 'text' does not hold texts|row 1: text is 1; allowed: a text"),
        ("empty", "cannot be loaded: "),
        ("./absent", "there is no folder './absent'"),
        ("some/name", "cannot be loaded: .*'some/name'"),
        ("", "allowed: datasets:<hub name or folder>"),
        (":train", "allowed: datasets:<hub name or folder>"),
    ],
)
def test_unusable_dataset_is_one_line(home: Path, name: str, reason: str) -> None:
    for folder, line in (("captions", '{"caption": "a cat"}'), ("numbers", '{"text": 1}')):
        (home / folder).mkdir()
        (home / folder / "train.jsonl").write_text(line)
    (home / "empty").mkdir()
    with pytest.raises(ConfigError, match=reason) as caught:
        load_prompts(f"datasets:{name}")
    assert f"'datasets:{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)
