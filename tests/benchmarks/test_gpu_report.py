"""The page of a device, from complete, partial and no lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_report.__main__ import main

GIB = 2**30


def start(**facts: Any) -> dict[str, Any]:
    given = {
        "device": "A card",
        "torch": "2.11.0",
        "python": "3.12",
        "date": "2026-01-01 10:00 UTC",
        "small": False,
    }
    return {"stage": "check", "what": "start", **given, **facts}


def iteration(stage: str, what: str, speed: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "what": what,
        "iteration": 2,
        "ratio_max_deviation": 0.0,
        "images_per_second": speed,
        "images_per_gpu_hour": 3600 * speed,
        "seconds_iteration": 16 / speed,
        "seconds_replay": 10 / speed,
        "allocated": 19 * GIB,
        "reserved": 21 * GIB,
        "taken": 22 * GIB,
    }


def call(competitor: str, rows: int, us: float) -> dict[str, Any]:
    size = 4 * 64 * 64 * 2 * 6 * rows
    return {
        "stage": "bandwidth",
        "what": "call",
        "op": "loop_loss",
        "setting": f"SD-{rows}-bfloat16",
        "competitor": competitor,
        "us": us,
        "host_us": 120.0,
        "bytes": size,
        "gb_per_s": size / us / 1e3,
        "copy_share": size / us / 1e3 / 2800,
    }


def ended(stage: str, outcome: str = "ok", reason: str = "") -> dict[str, Any]:
    return {"stage": stage, "what": "stage", "outcome": outcome, "seconds": 12.5, "reason": reason}


COMPLETE = [
    start(),
    {"stage": "machine", "what": "copy", "gb_per_s": 2800.0},
    {"stage": "machine", "what": "machine", "cores": 16},
    {"stage": "machine", "what": "matmul bfloat16", "size": 8192, "tflops": 700.0},
    {"stage": "machine", "what": "lacking", "packages": ["deepspeed (pip install deepspeed)"]},
    ended("machine"),
    {"stage": "ops", "what": "test", "test": "t.py::good", "outcome": "passed", "seconds": 1.0},
    {"stage": "ops", "what": "test", "test": "t.py::bad", "outcome": "failed", "error": "assert a | b"},
    ended("ops", "failed", "exit status 1"),
    {"stage": "sd15", "what": "lora", "planned_bytes": 20 * GIB},
    iteration("sd15", "lora", 5.0),
    {"stage": "sd15", "what": "full", "planned_bytes": 40 * GIB},
    {"stage": "sd15", "what": "full", "error": "OutOfMemoryError: CUDA out of memory", "taken": 79 * GIB},
    {"stage": "sd15", "what": "decode float32", "rows": 16, "precision": "float32", "ms_per_image": 45.0},
    iteration("sd35", "guidance 4.5", 2.0),
    {"stage": "bandwidth", "what": "copy", "gb_per_s": 2800.0},
    *(call(who, rows, us * rows) for who, us in (("ours", 1.0), ("eager", 10.0)) for rows in (16, 64)),
    {"stage": "ncu", "what": "kernel", "kernel": "loss_kernel", "grid": "(16, 1, 1)", "duration_us": 8.0},
    ended("ncu"),
    {"stage": "sanitizer", "what": "memcheck", "errors": 0, "first": []},
    ended("broken", "skipped", "there is no such file"),
]


def report(folder: Path, lines: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps({"run": "a run", **line}) + "\n" for line in lines)
    (folder / "results.jsonl").write_text(text, "utf-8")
    assert main([str(folder)]) == 0
    return (folder / "README.md").read_text("utf-8")


def rows(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("|")
    ]


def test_a_complete_run(tmp_path: Path) -> None:
    page = report(tmp_path, COMPLETE)
    assert page.startswith("# A card\n\ntorch 2.11.0, Python 3.12, 2026-01-01 10:00 UTC.")
    for name in ("roofline.png", "levers.png", "memory.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).stat().st_size > 10_000
    assert "failed after 12.5 s: exit status 1; 1 passed, 1 failed" in page
    assert "`t.py::bad`" in page
    assert r"`assert a \| b`" in page
    assert "`sd15: full`" in page
    assert "skipped after 12.5 s: there is no such file" in page
    assert "deepspeed (pip install deepspeed)" in page
    assert "this device, guidance 4.5" in page
    assert "7,200" in page
    assert "7,680" in page
    assert "**other hardware**" in page
    memory = next(row for row in rows(page) if row[0] == "| sd15: lora")
    assert memory[1:] == ["20.00 GiB", "19.00 GiB", "21.00 GiB", "22.00 GiB", "-9% |"]
    op = next(row for row in rows(page) if row[0] == "| loop_loss")
    assert op[1:] == ["SD-16-bfloat16", "16.0", "197", "7%", "10.00x", "", "120 |"]
    assert "`loss_kernel`" in page
    assert "memcheck found 0 errors" in page
    assert "Stages that have not run: recording, families, zero3." in page


@pytest.mark.parametrize("length", range(1, len(COMPLETE), 4))
def test_any_beginning_of_a_run(tmp_path: Path, length: int) -> None:
    """As a kill leaves it; the plots of nothing are those before it, which are taken away."""
    (tmp_path / "levers.png").write_bytes(b"of another run")
    page = report(tmp_path, COMPLETE[:length])
    assert "# A card" in page
    assert "Stages that have not run: " in page
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {name for name in ("roofline.png", "levers.png", "memory.png") if f"]({name})" in page}


def test_tiny_models_are_said_to_be_tiny(tmp_path: Path) -> None:
    page = report(tmp_path, [start(small=True), iteration("sd15", "lora", 1.0)])
    assert "**Tiny models" in page
    assert "ended with the check itself, before it was complete" in page


def test_without_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "holds no lines of benchmarks.gpu_check" in capsys.readouterr().err
