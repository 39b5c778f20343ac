"""The figures of a run of the check, in the form that tables and plots need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu_check.record import Line

Stages = Mapping[str, Sequence[Line]]

TRAINING = ("sd15", "sd35", "zero3")
"""Stages that train, by whose lines speed and memory are known."""


class Run(NamedTuple):
    """A configuration that was trained.

    Attributes:
        stage, name: the stage and the name of its measurement.
        last: figures of its last iteration; empty if none has ended.
        memory: bytes by ``plan``, ``allocated``, ``reserved`` and ``taken``, as far as they are known.
        notes: errors and warnings.
    """

    stage: str
    name: str
    last: Line
    memory: dict[str, int]
    notes: list[str]


def start(stages: Stages) -> Line:
    """Returns the first line of the latest run; empty if there is none."""
    return next((line for line in stages.get("check", ()) if line["what"] == "start"), {})


def named(stages: Stages, stage: str, what: str) -> Line | None:
    """Returns the last line with a name."""
    return next((line for line in reversed(stages.get(stage, ())) if line["what"] == what), None)


def runs(stages: Stages, stage: str) -> list[Run]:
    """Returns the trained configurations of a stage, in their order."""
    lines = [line for line in stages.get(stage, ()) if line["what"] not in ("stage", "skipped", "model")]
    names = dict.fromkeys(line["what"] for line in lines)
    found = []
    for name in names:
        mine = [line for line in lines if line["what"] == name]
        iterations = [line for line in mine if "iteration" in line]
        plan = [line["planned_bytes"] for line in mine if "planned_bytes" in line]
        if not iterations and not plan:
            continue
        memory = {"plan": plan[-1]} if plan else {}
        for key in ("allocated", "reserved", "taken"):
            if values := [line[key] for line in mine if key in line]:
                memory[key] = max(values)
        notes = [line[kind] for line in mine for kind in ("error", "warning") if kind in line]
        found.append(Run(stage, name, iterations[-1] if iterations else {}, memory, notes))
    return found


def parts(stages: Stages) -> list[Line]:
    """Returns single measurements of the stage sd15: sampling with and without the adapter, decoding."""
    return [line for line in stages.get("sd15", ()) if line["what"].startswith(("rollout ", "decode"))]


def calls(stages: Stages) -> list[Line]:
    """Returns the measured calls of the ops."""
    return [line for line in stages.get("bandwidth", ()) if line["what"] == "call" and "us" in line]


def kept(stages: Stages) -> dict[str, Any] | None:
    """Returns the calls in the form of a file of `benchmarks.keep`; None if there are none."""
    lines, copy, first = calls(stages), named(stages, "bandwidth", "copy"), start(stages)
    if not lines or copy is None:
        return None
    results: dict[str, Any] = {}
    for line in lines:
        competitors = results.setdefault(line["op"], {}).setdefault(line["setting"], {})
        figures = {key: line[key] for key in ("bytes", "gb_per_s", "copy_share", "host_us")}
        competitors[line["competitor"]] = {"median_us": line["us"], **figures}
    machine = {
        "device": first.get("device"),
        "backend": "Triton" if any(line.get("host_us") for line in lines) else "native",
        "copy_gb_per_s": copy["gb_per_s"],
        "torch": first.get("torch"),
        "date": str(first.get("date", ""))[:10],
    }
    return {"machine": machine, "results": results}
