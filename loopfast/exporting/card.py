"""Writes the model card of an exported model."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from loopfast.config import Config, ModelConfig, config_to_yaml
from loopfast.evaluation.exported import BASE, BASE_CONFIG, CARD
from loopfast.policies import load_family
from loopfast.policies.source import find_source
from loopfast.reporting import run_picture
from loopfast.run.checkpoints import Checkpoint
from loopfast.run.tracking import read_metrics
from loopfast.system.files import write_file
from loopfast.version import __version__

PICTURE = "training.png"


def write_card(run: Path, to: Path, config: Config, checkpoint: Checkpoint, *, full: bool) -> Path:
    """Writes the card, and a picture of the run if it kept images of two evaluations. Returns the card's file.

    Args:
        run: the run's folder.
        to: the folder of the exported model.
        full: a whole pipeline was exported, not an adapter.
    """
    metrics = read_metrics(run / "metrics.jsonl")
    metrics = [line for line in metrics if line["iteration"] <= checkpoint.iteration]
    upto = [line for line in metrics if "eval_reward" in line]
    files = sorted((run / "evaluation").glob("iteration-*.json"))
    pictured = len(files) > 1 and all(file.with_suffix(".png").is_file() for file in (files[0], files[-1]))
    if pictured:
        run_picture(run, to / PICTURE)
    names = [term.label or term.name for term in config.reward]
    pretrained = config.model.pretrained
    text = _template().render(
        base=_public_name(pretrained),
        is_hub=pretrained != "embedded" and _public_name(pretrained) == pretrained,
        is_embedded=pretrained == "embedded",
        places={} if full else _places(config.model, to),
        pipeline_class="DiffusionPipeline" if full else _pipeline_class(config.model),
        load_base=_load_base(config.model),
        sampled_with=_sampled_with(config),
        full=full,
        pixart=not full and (to / "adapter_config.json").is_file(),
        config=config,
        flow=load_family(config.model).process == "flow",
        rewards=config.reward,
        first=upto[0] if upto else None,
        last=upto[-1] if upto else None,
        parts=[name for name in names if upto and f"eval_{name}" in upto[0]],
        images=metrics[-1]["images"] if metrics else 0,
        iteration=checkpoint.iteration,
        picture=PICTURE if pictured else None,
        average=bool(checkpoint.tensors.get("average")),
        settings=config_to_yaml(_without_paths(config), defaults=False),
        version=__version__,
    )
    file = to / CARD
    write_file(file, text.encode())
    return file


def _places(model: ModelConfig, to: Path) -> dict[str, str]:
    """The header's keys for a base model that is not on the hub, with paths relative to the card's folder."""
    keys = {BASE: model.pretrained, BASE_CONFIG: model.config}
    found = {}
    for key, name in keys.items():
        place = Path(name or "").expanduser()
        if name == "embedded":
            found[key] = name
        elif name is not None and place.exists():
            found[key] = os.path.relpath(place.resolve(), to.resolve())
    return found


def _pipeline_class(model: ModelConfig) -> str:
    """The class that opens a model. For a single file, diffusers needs the class of the family."""
    return load_family(model).pipelines[0] if find_source(model).file else "DiffusionPipeline"


def _load_base(model: ModelConfig) -> str:
    """Python code that opens the base model. A folder is named by the last part of its path."""
    name = json.dumps(_public_name(model.pretrained))
    options = f"torch_dtype=torch.{model.dtype}"
    for key in ("revision", "variant"):
        if getattr(model, key) is not None:
            options = f'{key}="{getattr(model, key)}", {options}'
    if find_source(model).file is not None:
        described = "" if model.config is None else f'config="{_public_name(model.config)}", '
        return f"{_pipeline_class(model)}.from_single_file({name}, {described}{options})"
    place = 'files("loopfast.embedded") / "model"' if model.pretrained == "embedded" else name
    return f"DiffusionPipeline.from_pretrained({place}, {options})"


def _sampled_with(config: Config) -> str:
    """The arguments of a pipeline's call for images like those of the run."""
    model = config.model
    given: dict[str, Any] = {
        "num_inference_steps": config.rollout.steps,
        "guidance_scale": f"{config.rollout.guidance_scale:g}",
        **{key: getattr(model, key) for key in ("height", "width", "max_sequence_length")},
    }
    if load_family(model).pipelines[0].startswith("PixArt") and (model.height or model.width):
        given["use_resolution_binning"] = False  # binning would draw another size, and scale the images
    return ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)


def _public_name(pretrained: str) -> str:
    """A hub name, or the last part of a folder's path; the rest of the path is private."""
    place = Path(pretrained).expanduser()
    return place.name if place.is_absolute() or place.exists() else pretrained


def _without_paths(config: Config) -> Config:
    model = config.model
    named = {key: getattr(model, key) for key in ("pretrained", "config", "scheduler")}
    public: dict[str, Any] = {key: _public_name(name) for key, name in named.items() if isinstance(name, str)}
    start = model.lora.from_
    if start is not None:
        public["lora"] = model.lora.model_copy(update={"from_": _public_name(start)})
    model = model.model_copy(update=public)
    run = config.run.model_copy(update={"directory": "runs"})
    return config.model_copy(update={"model": model, "run": run})


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = (resources.files("loopfast.exporting") / "model_card.md.jinja").read_text("utf-8")
    return environment.from_string(text)
