"""Compares two runs that should be the same, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from loopfast.run.tracking import METRICS, read_metrics

# These differ between two equal runs.
MEASURED = {
    name for name, metric in METRICS.items() if metric.section in ("time", "speed") or metric.unit == "byte"
}


def outcome(folder: Path) -> dict[str, Any]:
    """Returns everything that should be the same, by names that show where it is found.

    These are the newest checkpoint's weights, optimizer and statistics, the exported weights, the metrics, and the
    evaluations with their images.
    """
    last = sorted(path for path in (folder / "checkpoints").iterdir() if not path.name.startswith("."))[-1]
    state = json.loads((last / "state.json").read_text("utf-8"))
    files = [
        *last.glob("*.safetensors"),
        *(path for part in _EXPORTED for path in (folder / part).rglob("*") if path.is_file()),
    ]
    lines = read_metrics(folder / "metrics.jsonl")
    return {
        "newest checkpoint": last.name,
        "iterations of metrics.jsonl": [line["iteration"] for line in lines],
        **{f"state.json: {name}": state[name] for name in ("engine", "prompt_statistics", "zero_gradient")},
        **{str(path.relative_to(folder)): _digest(path) for path in files},
        **{
            f"metrics.jsonl: {name} of iteration {line['iteration']}": value
            for line in lines
            for name, value in line.items()
            if name not in MEASURED
        },
        **{
            str(path.relative_to(folder)): json.loads(path.read_text("utf-8"))
            for path in (folder / "evaluation").glob("iteration-*.json")
        },
    }


# Folders of the run's folder whose files are compared.
_EXPORTED = ("model", "lora", "images")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns the names under which two outcomes differ, or that one of them lacks."""
    names = sorted(found.keys() | expected.keys())
    absent = object()
    return [name for name in names if found.get(name, absent) != expected.get(name, absent)]


def leftovers(folder: Path) -> list[str]:
    """Returns unfinished files and folders that a run has left in its folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
