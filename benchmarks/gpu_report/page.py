"""The page, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu_check.stages import STAGES
from benchmarks.gpu_check.table import outcome_of
from loopfast.reporting.tables import aligned_table

from .figures import TRAINING, Run, Stages, calls, named, parts, runs, start

PUBLISHED = {
    "UniRL": {"seconds": 45.0, "images_per_gpu_hour": 7680},
    "verl-omni": {"seconds": 111.3, "images_per_gpu_hour": 3103},
}
"""Seconds of a step of 48 prompts x 16 images on 8 H20, real weights and PickScore, as their authors report them."""

_PHASES = ("rollout", "reward", "replay", "optimizer")
_SHOWN_TESTS = 40


def write(stages: Stages, pictures: Sequence[str]) -> str:
    """Writes the page of a device.

    Args:
        stages: lines by stage.
        pictures: names of the plots in the same folder.
    """
    first = start(stages)
    small = "**Tiny models: this run tested only the check itself, and its figures mean nothing.**"
    made = (
        f"torch {first.get('torch')}, Python {first.get('python')}, {first.get('date')}. Made by `make gpu-check`; "
        "every figure is a line of [results.jsonl](results.jsonl)."
    )
    sections = [
        f"# {first.get('device')}",
        made,
        *([small] if first.get("small") else []),
        _stages(stages),
        *_failures(stages),
        *_machine(stages),
        *_sd15(stages, pictures),
        *_sd35(stages),
        *_memory(stages, pictures),
        *_ops(stages, pictures),
        *_kernels(stages),
        *_zero3(stages),
        *_missing(stages),
    ]
    return "\n\n".join(sections) + "\n"


def _stages(stages: Stages) -> str:
    rows = [
        (stage.name, stage.about, outcome_of(stages[stage.name])) for stage in STAGES if stage.name in stages
    ]
    return _table(("stage", "what it checks or measures", "result"), rows)


def _failures(stages: Stages) -> Iterator[str]:
    bad = [
        (line["test"], line.get("error", ""))
        for lines in stages.values()
        for line in lines
        if line["what"] == "test" and line["outcome"] in ("failed", "error")
    ]
    bad += [
        (
            f"{line['stage']}: {line['what']} {line.get('op', '')} {line.get('setting', '')}".strip(),
            line["error"],
        )
        for lines in stages.values()
        for line in lines
        if line["what"] != "test" and "error" in line
    ]
    if bad:
        yield "## What failed"
        yield _table(("what", "why"), [(_code(name), _code(why)) for name, why in bad[:_SHOWN_TESTS]])
        if len(bad) > _SHOWN_TESTS:
            yield f"And {len(bad) - _SHOWN_TESTS} more, in results.jsonl."


def _machine(stages: Stages) -> Iterator[str]:
    facts = named(stages, "machine", "machine")
    if facts is None:
        return
    yield "## The machine"
    copy = named(stages, "machine", "copy") or {}
    rows = [("copy of a large tensor", f"{copy['gb_per_s']:,.0f} GB/s")] if "gb_per_s" in copy else []
    for line in stages["machine"]:
        if line["what"].startswith("matmul") and "tflops" in line:
            rows.append((f"{line['what']}, {line['size']} square", f"{line['tflops']:.4g} TFLOP/s"))
    yield _table(("ceiling", "measured"), rows)
    lacking = named(stages, "machine", "lacking") or {}
    said = [f"{kind}: {'; '.join(names)}" for kind, names in lacking.items() if isinstance(names, list)]
    if said:
        yield "Missing:\n\n" + "\n".join(f"* {text}" for text in said)


def _sd15(stages: Stages, pictures: Sequence[str]) -> Iterator[str]:
    found = runs(stages, "sd15")
    if not found and not parts(stages):
        return
    yield "## Stable Diffusion 1.5's sizes"
    if found:
        yield (
            "512x512, random weights, guidance 5, 10 steps, 4 images for each prompt, bfloat16. The figures are from "
            "the last iteration; the ratio's deviation is the one before the first update."
        )
        yield _speeds(found)
    if "levers.png" in pictures:
        yield "![Images a second by lever](levers.png)"
    rows = []
    for line in parts(stages):
        if "error" not in line:
            speed = f"{line['images_per_second']:.3g} images/s" if "images_per_second" in line else ""
            rows.append((line["what"], str(line["rows"]), speed or f"{line['ms_per_image']:.3g} ms an image"))
    if rows:
        yield _table(("part", "rows", "speed"), rows)


def _speeds(found: Sequence[Run]) -> str:
    rows = []
    for run in found:
        last = run.last
        phases = [_number(last.get(f"seconds_{phase}")) for phase in _PHASES]
        speed = (_number(last.get("images_per_second")), _number(last.get("pairs_per_second")))
        deviation = _number(last.get("ratio_max_deviation"))
        rows.append(
            (
                run.name,
                *speed,
                _number(last.get("seconds_iteration")),
                *phases,
                deviation,
                "; ".join(run.notes),
            )
        )
    header = ("run", "images/s", "pairs/s", "iteration, s", *_PHASES, "|ratio - 1|", "messages")
    return _table(header, rows)


def _sd35(stages: Stages) -> Iterator[str]:
    found = runs(stages, "sd35")
    if not found:
        return
    yield "## Stable Diffusion 3.5 medium's sizes"
    yield (
        "384x384, 10 steps of which 3 are trained, LoRA of rank 32, 16 images for each prompt, random "
        "weights, no T5; the reward is a JPEG's size. The published figures are from **other hardware**, 8 H20, with "
        "real weights and PickScore, and do not state whether they use guidance. Compare only orders of magnitude."
    )
    yield _speeds(found)
    rows = [
        (f"this device, {run.name}", f"{run.last['images_per_gpu_hour']:,.0f}")
        for run in found
        if run.last.get("images_per_gpu_hour")
    ]
    rows += [
        (f"{name}, 8 H20, published", f"{entry['images_per_gpu_hour']:,}")
        for name, entry in PUBLISHED.items()
    ]
    yield _table(("", "images per GPU-hour"), rows)


def _memory(stages: Stages, pictures: Sequence[str]) -> Iterator[str]:
    found = [run for stage in TRAINING for run in runs(stages, stage)]
    if not found:
        return
    yield "## Memory against the plan"
    rows = []
    for run in found:
        sizes = [_gib(run.memory.get(kind)) for kind in ("plan", "allocated", "reserved", "taken")]
        plan, taken = run.memory.get("plan"), run.memory.get("taken")
        off = f"{plan / taken - 1:+.0%}" if plan and taken else ""
        rows.append((f"{run.stage}: {run.name}", *sizes, off))
    yield _table(("run", "`loopfast plan`", "in tensors", "reserved", "taken", "plan against taken"), rows)
    if "memory.png" in pictures:
        yield "![Memory at the peak against loopfast plan](memory.png)"


def _ops(stages: Stages, pictures: Sequence[str]) -> Iterator[str]:
    found = calls(stages)
    if not found:
        return
    yield "## The ops"
    yield "Time on the device, and the time that Python needs to start a call."
    by_case: dict[tuple[str, str], dict[str, Any]] = {}
    for line in found:
        by_case.setdefault((line["op"], line["setting"]), {})[line["competitor"]] = line
    rows = []
    for (op, setting), competitors in by_case.items():
        ours = competitors.get("ours")
        if ours is None:
            continue
        others = [
            f"{competitors[name]['us'] / ours['us']:.2f}x" if name in competitors else ""
            for name in ("eager", "compile")
        ]
        share = f"{ours['gb_per_s']:,.0f}", f"{ours['copy_share']:.0%}"
        rows.append((op, setting, f"{ours['us']:.1f}", *share, *others, _number(ours.get("host_us"))))
    header = ("op", "setting", "ours, µs", "GB/s", "of copy", "eager / ours", "compile / ours", "host, µs")
    yield _table(header, rows)
    if "roofline.png" in pictures:
        yield "![Share of the copy bandwidth, by op and bytes](roofline.png)"


def _kernels(stages: Stages) -> Iterator[str]:
    found = [line for line in stages.get("ncu", ()) if line["what"] == "kernel" and "duration_us" in line]
    if found:
        keys = ("duration_us", "dram_percent", "memory_percent", "sm_percent", "occupancy_percent")
        yield "## Nsight Compute"
        yield "The clocks are the card's own."
        rows = [
            (_code(line["kernel"]), str(line["grid"]), *(_number(line.get(key)) for key in keys))
            for line in found
        ]
        yield _table(("kernel", "grid", "µs", "DRAM, %", "memory, %", "SM, %", "occupancy, %"), rows)
    memcheck = named(stages, "sanitizer", "memcheck")
    if memcheck is not None and "errors" in memcheck:
        yield f"compute-sanitizer's memcheck found {memcheck['errors']} errors."


def _zero3(stages: Stages) -> Iterator[str]:
    if found := runs(stages, "zero3"):
        yield "## ZeRO-3 with offload, at SDXL's sizes"
        yield _speeds(found)


def _missing(stages: Stages) -> Iterator[str]:
    missing = [stage.name for stage in STAGES if stage.name not in stages]
    if missing:
        yield f"Stages that have not run: {', '.join(missing)}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return aligned_table(escaped[0], escaped[1:])


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`" if text else ""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"
