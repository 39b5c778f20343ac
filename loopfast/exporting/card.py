"""The model card of what was exported."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

import jinja2

from loopfast import __version__
from loopfast.checkpoints import Checkpoint
from loopfast.config import Config, config_to_yaml
from loopfast.files import write_file
from loopfast.policies import load_family
from loopfast.reporting import run_picture
from loopfast.tracking import read_metrics

PICTURE = "training.png"


def write_card(run: Path, to: Path, config: Config, checkpoint: Checkpoint, *, whole: bool) -> Path:
    """Writes ``README.md``, and where the run kept images of two evaluations a picture of before, after and the reward.

    Args:
        run: the run's folder.
        to: the folder of what was exported.
        config: the run's.
        checkpoint: what was exported.
        whole: whether it is a whole pipeline.

    Returns:
        The card's file.
    """
    metrics = [line for line in read_metrics(run / "metrics.jsonl") if "iteration" in line]
    evaluated = [line for line in metrics if "eval_reward" in line]
    upto = [line for line in evaluated if line["iteration"] <= checkpoint.iteration]
    pictured = _has_two_previews(run)
    if pictured:
        run_picture(run, to / PICTURE)
    names = [term.label or term.name for term in config.reward]
    text = _template().render(
        base=_public_name(config.model.pretrained),
        is_hub=_is_hub_name(config.model.pretrained),
        is_embedded=config.model.pretrained == "embedded",
        whole=whole,
        pixart=not whole and (to / "adapter_config.json").is_file(),
        config=config,
        flow=load_family(config.model).process == "flow",
        rewards=config.reward,
        first=upto[0] if upto else None,
        last=upto[-1] if upto else None,
        parts=[name for name in names if upto and f"eval_{name}" in upto[0]],
        images=next(
            (line["images"] for line in reversed(metrics) if line["iteration"] <= checkpoint.iteration), 0
        ),
        iteration=checkpoint.iteration,
        picture=PICTURE if pictured else None,
        average=bool(checkpoint.tensors.get("average")),
        settings=config_to_yaml(_without_paths(config), defaults=False),
        version=__version__,
    )
    file = to / "README.md"
    write_file(file, text.encode())
    return file


def _has_two_previews(run: Path) -> bool:
    files = sorted((run / "evaluation").glob("iteration-*.json"))
    return len(files) > 1 and all(file.with_suffix(".png").is_file() for file in (files[0], files[-1]))


def _is_hub_name(pretrained: str) -> bool:
    return pretrained != "embedded" and _public_name(pretrained) == pretrained


def _public_name(pretrained: str) -> str:
    """A hub name as it is; of a folder its last part: the rest is nobody else's business."""
    return Path(pretrained).expanduser().name if Path(pretrained).expanduser().exists() else pretrained


def _without_paths(config: Config) -> Config:
    scheduler = config.model.scheduler
    if isinstance(scheduler, str):
        scheduler = _public_name(scheduler)
    public = {"pretrained": _public_name(config.model.pretrained), "scheduler": scheduler}
    model = config.model.model_copy(update=public)
    run = config.run.model_copy(update={"directory": "runs"})
    return config.model_copy(update={"model": model, "run": run})


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = (resources.files("loopfast.exporting") / "model_card.md.jinja").read_text("utf-8")
    return environment.from_string(text)
