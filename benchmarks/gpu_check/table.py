"""The table at the end: the result of each stage, and its main figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .record import Line

_SHOWN_ERRORS = 20


def as_text(stages: Mapping[str, Sequence[Line]], about: Mapping[str, str]) -> str:
    """Returns a summary of a run as plain text.

    Args:
        stages: lines by stage, as `record.latest` returns them.
        about: what each stage checks or measures, in the order of the stages.
    """
    start = next((line for line in stages.get("check", ()) if line["what"] == "start"), {})
    parts = [f"{start.get('device')}, torch {start.get('torch')}, {start.get('date')}"]
    names = [name for name in about if name in stages]
    width = max((len(name) for name in names), default=0)
    parts += [f"{name:<{width}}  {outcome_of(stages[name])}" for name in names]
    for name in names:
        parts += [f"\n{name}: {about[name]}", *(f"  {text}" for text in _figures(stages[name]))]
    return "\n".join(parts) + "\n"


def outcome_of(lines: Sequence[Line]) -> str:
    """Returns the result of a stage in a few words."""
    ended = next((line for line in reversed(lines) if line["what"] == "stage"), None)
    if ended is None:
        text = "ended with the check itself, before it was complete"
    else:
        reason = next((line["reason"] for line in lines if line["what"] == "skipped"), ended.get("reason"))
        text = ended["outcome"] + (f" after {ended['seconds']:.1f} s" if ended.get("seconds") else "")
        text += f": {reason}" if reason else ""
    counts = Counter(line["outcome"] for line in lines if line["what"] == "test")
    if counts:
        text += "; " + ", ".join(f"{count} {name}" for name, count in counts.most_common())
    errors = sum("error" in line for line in lines if line["what"] not in ("test", "stage"))
    return text + (f"; {errors} with an error" if errors else "")


def _figures(lines: Sequence[Line]) -> Iterator[str]:
    tests = [line for line in lines if line["what"] == "test"]
    bad = [line for line in tests if line["outcome"] in ("failed", "error")]
    for line in bad[:_SHOWN_ERRORS]:
        yield f"{line['outcome']} {line['test']}: {line.get('error', '')}"
    if len(bad) > _SHOWN_ERRORS:
        yield f"... and {len(bad) - _SHOWN_ERRORS} more in results.jsonl"
    for line in lines:
        if line["what"] not in ("test", "stage", "skipped"):
            figures = {key: value for key, value in line.items() if key not in ("run", "stage", "what")}
            yield f"{line['what']}: {', '.join(f'{key} {_short(value)}' for key, value in figures.items())}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return "; ".join(map(_short, value)) if isinstance(value, list) else str(value)
