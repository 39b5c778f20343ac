"""A run's HTML report: one file that needs nothing else, in light and dark.

It is made from what the run has written so far, so it can be made at any time: for a run in progress, one that was
never evaluated, or one with a single line of metrics. It reads ``config.yaml``, ``metrics.jsonl``,
``evaluation/iteration-*.json`` with the sprite sheets beside them, and ``summary.json`` if it exists, whose ``facts``
(pairs of name and value) are shown as they are.
"""

from __future__ import annotations

from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import jinja2

from loopfast.reporting import sections
from loopfast.reporting.records import RunRecord
from loopfast.system.files import write_file, writing
from loopfast.version import __version__

__all__ = ["write_report"]


def write_report(run_directory: Path) -> Path:
    """Writes ``report.html`` into a run's folder, and returns its path. An earlier report is replaced.

    Raises:
        LoopfastError: the folder is not a run's, a file in it is damaged, or the report cannot be written.
    """
    run = RunRecord.read(Path(run_directory))
    html = _template().render(
        run=run,
        stats=sections.stats(run),
        facts=sections.facts(run),
        reward=sections.reward(run),
        categories=sections.categories(run),
        pairs=sections.pairs(run),
        film=sections.film(run),
        diagnostics=sections.diagnostics(run),
        phases=sections.phases(run),
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = run.directory / "report.html"
    with writing(path):
        write_file(path, html.encode())
    return path


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(score=sections.format_score, signed=sections.format_change, duration=_duration)
    return environment.get_template("report.html")


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02d} min"
    return f"{minute} min {second:02d} s" if minute else f"{second} s"
