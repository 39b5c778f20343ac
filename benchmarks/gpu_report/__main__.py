"""``python -m benchmarks.gpu_report FOLDER``: the page and the plots of a device, from results.jsonl in the folder.

The latest run of each stage counts. The page names what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.record import latest, read_lines

from . import page, pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    stages = latest(read_lines(folder / "results.jsonl"))
    if not stages:
        print(f"{folder / 'results.jsonl'} holds no lines of benchmarks.gpu_check", file=sys.stderr)
        return 1
    drawn = pictures.draw(stages, folder)
    (folder / "README.md").write_text(page.write(stages, drawn), "utf-8")
    print(f"{folder / 'README.md'}, {', '.join(drawn) or 'no plots: no figures for them'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
