"""The Python interface: ``loopfast.train``, and the run that it returns. See docs/python.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from loopfast.config import Config
from loopfast.errors import RunExistsError
from loopfast.evaluation import run_config
from loopfast.exporting import trained_pipeline
from loopfast.prompts import Prompt
from loopfast.run.console import Display
from loopfast.run.notebook import NotebookDisplay, in_notebook
from loopfast.run.tracking import read_metrics
from loopfast.system.libraries import undisturbed
from loopfast.training import train as training
from loopfast.training.callbacks import Callback, Iteration
from loopfast.training.objects import configured

__all__ = ["Iteration", "Prompt", "TrainedRun", "train"]

Reward = Callable[..., Any] | str | Mapping[str, Any]
"""A function, the name of a reward, or a term of the reward: a mapping with the keys of `RewardConfig`, whose ``name``
may be a function."""


class TrainedRun:
    """The results of a run, in its folder.

    Args:
        folder: the run's folder.

    Attributes:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.folder)!r})"

    @cached_property
    def config(self) -> Config:
        """The run's configuration.

        Raises:
            ConfigError: the folder is not that of a run.
        """
        return run_config(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of each iteration, first those before training. `loopfast.run.tracking.METRICS` describes them.

        Every use reads the file again.
        """
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def report(self) -> Path:
        """The page with curves and images, which is written at the end of the run."""
        return self.folder / "report.html"

    @property
    def model(self) -> Path:
        """The exported model: the folder of a pipeline or of a LoRA."""
        return self.folder / ("model" if self.config.model.tune == "full" else "lora")

    def pipeline(self) -> Any:
        """Returns a diffusers pipeline with the trained weights, on the CPU in ``model.dtype``.

        Raises:
            ConfigError: the run has not exported a model yet, or its base model cannot be loaded.
        """
        with undisturbed():
            return trained_pipeline(self.config.model, self.model)


def train(
    config: str | Path | Config | Mapping[str, Any],
    *,
    reward: Reward | Iterable[Reward] | None = None,
    prompts: Mapping[str, Any] | str | Path | Iterable[str | Prompt] | None = None,
    model: Mapping[str, Any] | str | Path | object | None = None,
    callbacks: Iterable[Callback] = (),
    resume: str | Path | None = None,
    quiet: bool = False,
    display: Display | None = None,
    overrides: Sequence[str] = (),
    **sections: Mapping[str, Any],
) -> TrainedRun:
    """Trains a model, like ``loopfast train``.

    Every process of a launch (``torchrun``, ``mpirun``, ...) calls it with the same arguments. At the end the process
    has its earlier signal handlers, warnings, verbosity of libraries, and PyTorch arithmetic again.

    Args:
        config: the name of a recipe, the path of a YAML file, or the content of such a file.
        reward: the reward in place of the configuration's. A function is called as
            ``function(images [N, 3, H, W], prompts, metadata)`` and returns N numbers, see `loopfast.rewards.Reward`.
        prompts: texts (or `Prompt` objects) to train on, the name of a source of prompts, or keys of the section
            ``prompts``. Texts are stored in the run's folder.
        model: a diffusers pipeline, a model's name or path, or keys of the section ``model``, whose ``pretrained`` may
            be a pipeline. A pipeline is copied into the run's folder, and is not changed.
        callbacks: functions called with an `Iteration` after every iteration. Its `stop` ends the run.
        resume: ``auto`` for the newest undamaged checkpoint of the run's folder, or a checkpoint's path. None begins a
            new run.
        quiet: show warnings only.
        display: the display of the run's progress; None shows it in the terminal or the notebook.
        overrides: ``"section.key=value"`` each, like ``--set`` on the command line.
        sections: keys of the other sections, such as ``train={"iterations": 5}``.

    Returns:
        The run.

    Raises:
        LoopfastError: the run cannot start or continue; the message says why. Saved files remain.
        Interrupted: a signal stopped the run, whose state is saved.
    """
    changes: dict[str, Any] = dict(sections)
    if reward is not None:
        changes["reward"] = reward
    if prompts is not None:
        changes["prompts"] = prompts if isinstance(prompts, Mapping) else {"source": prompts}
    if model is not None:
        changes["model"] = model if isinstance(model, Mapping) else {"pretrained": model}
    found, objects = configured(config, changes, overrides)
    shown = display or (NotebookDisplay(quiet) if in_notebook() else Display(quiet))
    with undisturbed(), shown:
        try:
            folder = training.train(
                found,
                resume=None if resume is None else str(resume),
                display=shown,
                objects=objects,
                callbacks=tuple(callbacks),
            )
        except RunExistsError as error:
            raise error.advising('resume="auto"', f'run={{"name": "{error.free_name}"}}') from None
    return TrainedRun(folder)
