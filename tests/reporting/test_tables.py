from __future__ import annotations

from loopfast.reporting.tables import aligned_table, plain_table

HEADER, ROWS = ("name", "ms"), [("a", "0.5"), ("longer", "12")]


def test_plain_cells_are_as_wide_as_their_text() -> None:
    assert plain_table(HEADER, ROWS) == "| name | ms |\n| --- | --- |\n| a | 0.5 |\n| longer | 12 |"


def test_columns_are_aligned_in_the_source() -> None:
    assert aligned_table(HEADER, ROWS).splitlines() == [
        "| name   |  ms |",
        "| :----- | --: |",
        "| a      | 0.5 |",
        "| longer |  12 |",
    ]
