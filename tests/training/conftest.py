from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.training.toys import MakeToy, Toy, toy_run


@pytest.fixture(autouse=True)
def _signals_as_in_the_foreground(foreground: None) -> None:
    pass


@pytest.fixture
def make_toy(tmp_path: Path) -> Iterator[MakeToy]:
    """``make_toy("section.key=value", ...)``: a toy run in a folder of its own, open until the test ends."""
    with ExitStack() as ends:
        made = []

        def make(*overrides: str) -> Toy:
            folder = tmp_path / str(len(made))
            folder.mkdir()
            made.append(ends.enter_context(toy_run(folder, *overrides)))
            return made[-1]

        yield make
