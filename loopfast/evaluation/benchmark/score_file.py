"""The file of a benchmark's scores. It is written after each batch, so that a stopped benchmark can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loopfast.config.messages import differences
from loopfast.errors import ConfigError, LoopfastError
from loopfast.system.files import write_file, writing


@dataclass(frozen=True)
class Scored:
    """One image's score, with its prompt index, image index and noise seed."""

    prompt: int
    image: int
    seed: int
    score: float


class ScoreFile:
    """A file of JSON lines: first the settings that the scores depend on, then one image per line.

    Args:
        path: the file, which is created if it is missing. A last line that is half written is removed.
        settings: everything that the scores depend on, except which images there are, in a form that JSON can hold.

    Attributes:
        scores: the images' scores by (prompt index, image index).

    Raises:
        ConfigError: the file holds scores of other settings; the message lists the differences.
        LoopfastError: the file is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[tuple[int, int], float] = {}
        with writing(path.parent):
            # the rest, after the last line end, was cut off
            *complete, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
            if complete:
                self._read(complete, settings)
            if rest or not complete:
                lines = complete or [json.dumps({"settings": settings}).encode()]
                write_file(path, b"".join(line + b"\n" for line in lines))

    def add(self, rows: Sequence[Scored]) -> None:
        """Adds scores. When this returns, they are on the disk.

        Raises:
            LoopfastError: the disk is full or cannot be written.
        """
        data = b"".join(json.dumps(asdict(row)).encode() + b"\n" for row in rows)
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
        if changed := differences(before, json.loads(json.dumps(settings))):
            raise ConfigError(
                f"{self.path} holds scores of other settings: {', '.join(changed)}; choose another folder with "
                f"--output, or remove the file"
            )
