from __future__ import annotations

from pathlib import Path

import pytest

from loopfast.errors import ConfigError
from loopfast.rewards.models.weights import is_file, require_file, require_folder


def test_sources_are_local_or_on_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    file.touch()
    assert require_folder("r", "weights", "owner/name").name == "owner/name"
    assert require_folder("r", "weights", "name").name == "name"
    assert require_file("r", "head", "owner/name/folder/head.pth").name == "owner/name/folder/head.pth"
    assert require_file("r", "head", str(file)).name == str(file)
    assert is_file(str(file))
    assert is_file("owner/name/file.pt")
    assert is_file("./absent.pt")
    assert not is_file("owner/name")
    assert not is_file(str(tmp_path))


def test_absent_sources_are_named(tmp_path: Path, clip_folder: Path) -> None:
    cases = [
        (require_folder, "./nowhere", "is not there; expected: a folder with a model's files, or a hub name"),
        (require_folder, "a/b/c", "is neither a folder nor a hub name such as owner/name"),
        (require_folder, str(tmp_path), r"no config.json, *.safetensors in this folder"),
        (require_folder, "", "allowed: a folder or a hub name"),
        (require_file, str(clip_folder), "is not there; expected: a file of weights"),
        (require_file, "owner/name", "is no file on the hub, such as owner/name/file"),
        (require_file, None, "allowed: a file, or owner/name/file on the hub"),
    ]
    for check, source, reason in cases:
        with pytest.raises(ConfigError) as caught:
            check("r", "weights", source)  # type: ignore[operator]
        assert str(caught.value).startswith("reward 'r': weights: ")
        assert reason in str(caught.value)
