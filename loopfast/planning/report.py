"""A plan as tables for a terminal, and as data."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from loopfast.planning.devices import NETWORK
from loopfast.planning.memory import BYTES, NODE
from loopfast.planning.plan import Plan, Stage
from loopfast.planning.savings import MOST_SAMPLES
from loopfast.planning.speed import Scale
from loopfast.rewards.registry import REWARDS


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as data for JSON: numbers without units, in bytes, seconds and operations."""
    architecture, resources, device = plan.architecture, plan.resources, plan.device
    return {
        "model": {
            "name": architecture.name,
            "title": architecture.title,
            "pipeline": architecture.pipeline,
            "trainable_by_this_release": architecture.trainable,
            "tune": plan.config.model.tune,
            "parameters": {
                "denoiser": plan.weights.parameters,
                "trained": plan.weights.trained,
                "autoencoder": architecture.vae.parameters(),
                "text_encoders": [encoder.parameters() for encoder in architecture.text_encoders],
            },
        },
        "device": {
            "kind": resources.device,
            "title": device.title,
            "gpus": resources.gpus,
            "memory": resources.usable,
            "rates": device.rates,
            "utilisation": device.utilisation,
            "source": device.source,
        },
        "zero_stage": plan.config.distributed.zero_stage,
        "stages": [_stage(stage) for stage in plan.stages],
        "fits": plan.chosen.fits,
        "levers": {
            "fits": plan.advice.fits,
            "overrides": plan.advice.overrides,
            "steps": [{**asdict(applied.saving), "total": applied.total} for applied in plan.advice.savings],
        },
        "iteration": {
            "operations": asdict(plan.work),
            "seconds": {**plan.seconds, "total": sum(plan.seconds.values())},
        },
        "scaling": {
            "weak": [asdict(scale) for scale in plan.weak],
            "strong": [asdict(scale) for scale in plan.strong],
        },
        "not_counted": _not_counted(plan),
    }


def _stage(stage: Stage) -> dict[str, Any]:
    found = stage.footprint
    return {
        "stage": found.stage,
        "total": found.total,
        "fits": stage.fits,
        "peak_phase": found.peak_phase,
        **asdict(found),
        "largest_samples_per_prompt": stage.largest_samples,
        "largest_microbatch": stage.largest_microbatch,
    }


def as_tables(plan: Plan) -> RenderableType:
    """Returns a plan as tables."""
    parts: list[RenderableType] = [_heading(plan), _memory(plan), _host(plan), _advice(plan), _seconds(plan)]
    if plan.resources.device == "cuda":
        for title, scales in (("images grow with the GPUs", plan.weak), ("the same images", plan.strong)):
            parts.append(_scaling(plan, title, scales))
    parts += [f"Not counted: {text}." for text in _not_counted(plan)]
    return Group(*parts)


def _heading(plan: Plan) -> str:
    counts, resources = plan.weights, plan.resources
    trained = "all weights" if plan.config.model.tune == "full" else f"LoRA of {_millions(counts.trained)}"
    networks = (
        f"denoiser {_millions(counts.parameters)} ({trained} trained)",
        f"autoencoder {_millions(plan.architecture.vae.parameters())}",
        f"text encoders {_millions(plan.architecture.text_parameters)} parameters",
    )
    lines = [
        f"{plan.architecture.title}: {', '.join(networks)}",
        f"{resources.gpus} x {plan.device.title}, {_gib(resources.usable)} each",
    ]
    if not plan.architecture.trainable:
        lines.append(f"This release plans a {plan.architecture.pipeline}, but does not train it.")
    return "\n".join(lines)


def _memory(plan: Plan) -> Table:
    table = Table(title="memory of each GPU" if plan.resources.device == "cuda" else "memory of a process")
    table.add_column("GiB")
    for stage in plan.stages:
        chosen = " (configured)" if stage is plan.chosen else ""
        table.add_column(f"ZeRO {stage.footprint.stage}{chosen}", justify="right")
    prints = [stage.footprint for stage in plan.stages]
    held = dict.fromkeys(name for found in prints for name in found.held)
    for name in held:
        table.add_row(name, *(_number(found.held.get(name)) for found in prints))
    table.add_section()
    for phase in dict.fromkeys(phase for found in prints for phase in found.phases):
        names = dict.fromkeys(name for found in prints for name in found.phases.get(phase, {}))
        for name in names:
            values = [found.phases.get(phase, {}).get(name) for found in prints]
            if any(value is not None and value >= 0.005 * 2**30 for value in values):
                table.add_row(f"{phase}: {name}", *map(_number, values))
    table.add_section()
    table.add_row("peak", *(f"[bold]{_number(found.total)}[/bold]" for found in prints))
    table.add_row("in phase", *(found.peak_phase for found in prints))
    table.add_row("fits", *("yes" if stage.fits else "[bold]no[/bold]" for stage in plan.stages))
    rows = (f"{found.batch.rollout} / {found.batch.replay}" for found in prints)
    table.add_row("rows per call, rollout / replay", *rows)
    at_least = {MOST_SAMPLES: f">= {MOST_SAMPLES}", None: "none"}
    samples = (stage.largest_samples for stage in plan.stages)
    table.add_row("largest K", *(at_least.get(most, str(most)) for most in samples))
    table.add_row("largest microbatch", *(str(stage.largest_microbatch or "none") for stage in plan.stages))
    return table


def _host(plan: Plan) -> str:
    host = plan.chosen.footprint.host
    if not host:
        return "The host's memory is the device's."
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in host.items())
    return f"Host memory of a node with {plan.resources.on_host} process(es), not all at once: {parts}"


def _advice(plan: Plan) -> RenderableType:
    advice = plan.advice
    if not advice.savings and advice.fits:
        return "It fits as configured."
    title = "the cheapest savings with which it fits" if advice.fits else "it does not fit with all savings"
    table = Table("saving", "--set", "GiB then", "costs", title=title)
    for applied in advice.savings:
        sets = " ".join(f"{key}={value}" for key, value in applied.saving.settings.items())
        table.add_row(applied.saving.name, sets, _number(applied.total), applied.saving.cost)
    return table


def _seconds(plan: Plan) -> Table:
    device, model = plan.device, plan.config.model
    rate = device.rate(model.dtype, model.tf32)
    source = f"datasheet rates ({model.dtype})" if device.kind == "cuda" else device.source
    table = Table(
        "an iteration, each process",
        "operations",
        "seconds",
        title=f"estimated from {source}, of which {device.utilisation:.0%} are assumed: {rate / 1e12:,.3g} TFLOP/s",
    )
    operations = {name: f"{size / 1e12:,.3g} TFLOP" for name, size in asdict(plan.work).items()}
    operations["optimizer"] = f"{plan.work.optimizer / 1e9:,.3g} GB moved"
    for name, seconds in plan.seconds.items():
        table.add_row(name, operations[name], _significant(seconds))
    table.add_section()
    table.add_row("total", "", _significant(sum(plan.seconds.values())))
    return table


def _scaling(plan: Plan, title: str, scales: list[Scale]) -> Table:
    device = plan.device
    link = (
        f"{device.link / 1e9:g} GB/s ({device.link_name}) within {NODE} GPUs, {NETWORK / 1e9:g} GB/s beyond"
    )
    table = Table(
        "GPUs", "images", "compute", "communication", "sent by each", "efficiency", title=f"{title}: {link}"
    )
    for scale in scales:
        table.add_row(
            str(scale.gpus),
            f"{scale.images:,}",
            f"{_significant(scale.compute_seconds)} s",
            f"{_significant(scale.communication_seconds)} s",
            f"{sum(scale.bytes_sent.values()) / 1e9:,.3g} GB",
            f"{scale.efficiency:.0%}",
        )
    return table


def _not_counted(plan: Plan) -> list[str]:
    config = plan.config
    names = [term.name for term in config.reward]
    own = ", ".join(name for name in names if ":" in name)
    learned = ", ".join(name for name in names if name in REWARDS and REWARDS[name].weights)
    encoded = plan.architecture.text_tokens * plan.architecture.text_width * BYTES[config.model.dtype] / 2**20
    text_adapter = config.model.lora.text_encoder and config.model.tune == "lora"
    applies = {
        "evaluations and checkpoints (in the seconds)": True,
        f"the model of your own reward ({own}), in memory and seconds": own,
        f"the model of a reward ({learned}), in memory and seconds": learned,
        f"the encoded prompts, {encoded:.2f} MiB each, which stay on the host if they are many": (
            config.model.free_text_encoder
        ),
        "the text encoder's adapter, and the gradients through the text encoder": text_adapter,
        "the steps that train.steps: auto skips (in the seconds)": config.train.steps == "auto",
        "the time that torch.compile saves": config.model.compile != "off",
    }
    return [text for text, applying in applies.items() if applying]


def _significant(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def _number(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:,.2f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
