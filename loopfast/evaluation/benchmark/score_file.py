"""The scores of a benchmark's images, kept as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopfast.config.messages import differences
from loopfast.errors import ConfigError, LoopfastError
from loopfast.system.files import write_file, writing


@dataclass(frozen=True)
class Scored:
    """The score of one image: of which prompt, by its position, the how manieth of it, and the seed of its noise."""

    prompt: int
    image: int
    seed: int
    score: float


class ScoreFile:
    """A file of JSON lines: first the settings that the scores depend on, then one image a line.

    Args:
        path: the file; made if it is not there. A last line that is half written is removed.
        settings: everything that determines the scores but which images there are; JSON can hold it.

    Attributes:
        scores: of each image, by the position of its prompt and its number among the prompt's images.

    Raises:
        ConfigError: the file holds scores of other settings; the message says which.
        LoopfastError: it is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[tuple[int, int], float] = {}
        with writing(path.parent):
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last line end was cut off
        if not whole:
            with writing(path.parent):
                write_file(path, _line({"settings": settings}))
            return
        self._read(whole, settings)
        if lines[-1]:
            with writing(path.parent):
                write_file(path, b"".join(line + b"\n" for line in whole))

    def add(self, rows: Sequence[Scored]) -> None:
        """Keeps scores; when this returns, they are on the disk.

        Raises:
            LoopfastError: the disk is full or cannot be written.
        """
        data = b"".join(
            _line({"prompt": row.prompt, "image": row.image, "seed": row.seed, "score": row.score})
            for row in rows
        )
        with writing(self.path.parent), self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.scores |= {(row.prompt, row.image): row.score for row in rows}

    def _read(self, lines: Sequence[bytes], settings: Mapping[str, Any]) -> None:
        before: dict[str, Any] = {}
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    before = entry["settings"]
                else:
                    self.scores[int(entry["prompt"]), int(entry["image"])] = float(entry["score"])
            except (ValueError, KeyError, TypeError):
                raise LoopfastError(
                    f"{self.path} is damaged: line {number} is not as it was written; remove the file to begin anew"
                ) from None
        if changed := differences(before, json.loads(_line(settings))):
            raise ConfigError(
                f"{self.path} holds scores of other settings: {', '.join(changed)}; choose another folder with "
                f"--output, or remove the file"
            )


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
