"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are as wide as their text."""
    return "\n".join(map(_line, [header, ["---"] * len(header), *rows]))


def aligned_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned in its source, too: the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def padded(row: Sequence[str]) -> list[str]:
        return [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    first, *others = map(padded, cells)
    return "\n".join(map(_line, [first, rule, *others]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
