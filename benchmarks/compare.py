"""``python -m benchmarks.compare A B`` shows what changed from A to B; ``compare A`` compares ours with the others.

Both print Markdown. The files were written by `benchmarks.keep` or by pytest-benchmark itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loopfast.reporting.tables import aligned_table

from .keep import load

Row = Sequence[str]


class Change(NamedTuple):
    """A result that both runs have; `ratio` is the new median over the old one."""

    name: str
    before_us: float
    after_us: float

    @property
    def ratio(self) -> float:
        return self.after_us / self.before_us


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1000:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"


def _setting(text: str) -> tuple[str, int, str]:
    shape, rows, dtype = text.rsplit("-", 2)
    return shape, int(rows), dtype


def _order(setting: str) -> tuple[int, str, str, int]:
    shape, rows, dtype = _setting(setting)
    known = ("SD", "SDXL", "SD3")
    return known.index(shape) if shape in known else len(known), shape, dtype, rows


def _settings(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for op, settings in sorted(results.items()):
        for setting in sorted(settings, key=_order):
            yield op, setting, settings[setting]


def speedups(run: dict[str, Any]) -> str:
    """Returns a table of ours against each competitor, with a line for each op and setting, and on a GPU our host time.

    Args:
        run: a result of `benchmarks.keep.load`.
    """
    rows = []
    for op, setting, competitors in _settings(run["results"]):
        ours = competitors.get("ours")
        if ours is None or "gb_per_s" not in ours:
            continue

        def against(competitor: str, ours: Any = ours, competitors: Any = competitors) -> str:
            other = competitors.get(competitor)
            return "" if other is None else f"{other['median_us'] / ours['median_us']:.1f}×"

        shape, count, dtype = _setting(setting)
        rows.append(
            (
                op,
                shape,
                str(count),
                dtype,
                _time(ours["median_us"]),
                *map(against, ("eager", "compile", "trl")),
                f"{ours['gb_per_s']:.3g}",
                f"{ours['copy_share']:.0%}",
                _time(ours["host_us"]) if ours.get("host_us") else "",
            )
        )
    header = ("op", "latent", "rows", "dtype", "ours", "eager", "compile", "TRL", "GB/s", "of copy", "host")
    return aligned_table(header, rows)


def engine(run: dict[str, Any]) -> str:
    """Returns a table of the engine's competitors, with a line for each phase and competitor; empty without
    measurements.

    Args:
        run: a result of `benchmarks.keep.load`.
    """
    rows = []
    for op, setting, competitors in _settings(run["results"]):
        for name, entry in sorted(competitors.items(), key=lambda item: item[1].get("ratio", 0.0)):
            if "ratio" not in entry:
                continue
            rate = next(
                f"{entry[key]:.3g} {unit}"
                for key, unit in (("images_per_s", "images/s"), ("pairs_per_s", "pairs/s"))
                if key in entry
            )
            memory = f"{entry['peak_bytes'] / 2**20:.0f} MiB"
            cells = (op.removeprefix("engine_"), setting, name, _time(entry["median_us"]), rate)
            rows.append((*cells, f"{entry['ratio']:.2f}×", memory))
    header = ("phase", "setting", "competitor", "median", "rate", "time / ours", "peak memory")
    return aligned_table(header, rows) if rows else ""


def _flat(run: dict[str, Any]) -> dict[str, float]:
    return {
        f"{op} {setting} {competitor}": entry["median_us"]
        for op, setting, competitors in _settings(run["results"])
        for competitor, entry in sorted(competitors.items())
    }


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = sorted(before["machine"].keys() | after["machine"].keys())
    values = [(name, before["machine"].get(name), after["machine"].get(name)) for name in names]
    return [f"{name}: {old} → {new}" for name, old, new in values if old != new]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        1 if one of our medians grew more than allowed, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, nargs="?", metavar="B")
    parser.add_argument("--threshold", type=float, default=1.05, help="show ratios beyond it (1.05)")
    parser.add_argument(
        "--fail-above", type=float, metavar="RATIO", help="exit with 1 if a median of ours grew by more"
    )
    options = parser.parse_args(arguments)
    before = load(options.before)
    if options.after is None:
        print("\n\n".join(filter(None, (speedups(before), engine(before)))))
        return 0
    after = load(options.after)
    old, new = _flat(before), _flat(after)
    changes = [Change(name, old[name], new[name]) for name in old if name in new]
    moved = [c for c in changes if max(c.ratio, 1 / c.ratio) > options.threshold]
    moved.sort(key=lambda change: -change.ratio)
    for difference in _differences(before, after):
        print(difference)
    print(f"{len(moved)} of {len(changes)} medians moved by more than {options.threshold:g}×")
    if moved:
        rows = [(c.name, _time(c.before_us), _time(c.after_us), f"{c.ratio:.2f}×") for c in moved]
        print(aligned_table(("benchmark", "A", "B", "B / A"), rows))
    for title, names in (("only in A", old.keys() - new.keys()), ("only in B", new.keys() - old.keys())):
        for name in sorted(names):
            print(f"{title}: {name}")
    if options.fail_above is None:
        return 0
    slower = [c.name for c in changes if c.name.endswith(" ours") and c.ratio > options.fail_above]
    for name in slower:
        print(f"regression beyond {options.fail_above:g}×: {name}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
