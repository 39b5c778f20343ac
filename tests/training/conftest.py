from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from loopfast.policies import load_policy
from loopfast.training import setup
from tests.training.toys import MakeToy, Toy, toy_run


@pytest.fixture(autouse=True)
def _as_it_was(foreground: None) -> Iterator[None]:
    """Signals as in the foreground; after the test no toy replaces a model."""
    yield
    assert setup.load_policy is load_policy


@pytest.fixture
def make_toy(tmp_path: Path) -> Iterator[MakeToy]:
    """``make_toy("section.key=value", ...)`` makes a toy run in its own folder, which is open until the test ends."""
    with ExitStack() as ends:
        made = []

        def make(*overrides: str) -> Toy:
            folder = tmp_path / str(len(made))
            folder.mkdir()
            made.append(ends.enter_context(toy_run(folder, *overrides)))
            return made[-1]

        yield make
