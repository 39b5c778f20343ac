"""What the documents say of the repository is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.study import METHODS, Result, table

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "docs" / "study"
DOCUMENTS = [path for path in ROOT.glob("**/*.md") if not re.search(r"/(\.venv[^/]*|build|runs)/", str(path))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8"))
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not missing


def test_readme_shows_the_study_as_it_came_out() -> None:
    record = json.loads((STUDY / "results.json").read_text("utf-8"))
    results = [Result(**result) for result in record["final"]]
    assert {result.method for result in results} == {method.name for method in METHODS}
    measured = table(results)
    assert (STUDY / "results.md").read_text("utf-8") == measured
    assert measured in (ROOT / "README.md").read_text("utf-8")


def test_study_compares_at_equal_images() -> None:
    record = json.loads((STUDY / "results.json").read_text("utf-8"))
    assert len({result["images"] for result in record["final"]}) == 1
    seeds = {method.name: set() for method in METHODS}
    for result in record["final"]:
        seeds[result["method"]].add(result["seed"])
    assert len({frozenset(s) for s in seeds.values()}) == 1
    assert all(len(s) >= 3 for s in seeds.values())
