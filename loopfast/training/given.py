"""What a Python program gives a run as objects, where a configuration has names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopfast.config import Config
from loopfast.errors import ConfigError, first_line
from loopfast.prompts import Prompt, as_prompts
from loopfast.run.folder import RunFolder
from loopfast.system.files import write_file, writing

PIPELINE = "base"
"""Name of the folder, in that of the run, where a pipeline object is kept."""


@dataclass(frozen=True)
class Given:
    """Objects of a Python program. Prompts and pipelines are written into the run's folder, and named by their paths.

    Attributes:
        rewards: functions that no module has under a name, by the names that the configuration has for them.
        prompts: lists of prompts, by the names of their files.
        pipeline: a diffusers pipeline; None: ``model.pretrained`` names one.
    """

    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    pipeline: Any = None

    def check(self, config: Config) -> None:
        """Checks that the configuration has a use for the objects.

        Raises:
            ConfigError: it has rewards scored in another process, which cannot import a function without a name.
        """
        if self.rewards and config.rollout.reward_worker == "process":
            raise ConfigError(
                f"rollout.reward_worker: found process, allowed: auto, none, inline or thread with reward "
                f"{min(self.rewards)}, an object that another process cannot import"
            )

    def notes(self) -> list[str]:
        """What cannot be resumed from the command line, a line each."""
        return [
            f"reward {name} is an object that a checkpoint cannot name: to resume this run, call loopfast.train with "
            "it again"
            for name in self.rewards
        ]

    def write(self, folder: RunFolder, resume: str | None) -> None:
        """Writes prompts and pipeline into a run's folder. A run that is resumed keeps its pipeline.

        Args:
            folder: the run's.
            resume: as for `RunFolder.open`.

        Raises:
            ConfigError: the folder has a run that may not be gone on with, or the pipeline cannot be saved.
            CheckpointError: the run to resume is not there.
            WriteError: the folder cannot be written.
        """
        if not self.prompts and self.pipeline is None:
            return
        continues = folder.continues(resume)
        for name, prompts in self.prompts.items():
            with writing(folder.path):
                write_file(folder.path / name, _as_lines(prompts).encode())
        place = folder.path / PIPELINE
        if self.pipeline is None or (continues and place.exists()):
            return
        whole = place.with_name(f".tmp-{PIPELINE}")
        with writing(folder.path):
            for former in (whole, place):
                shutil.rmtree(former, ignore_errors=True)
            _save(self.pipeline, str(whole))
            whole.rename(place)


def _save(pipeline: Any, place: str) -> None:
    try:
        pipeline.save_pretrained(place, safe_serialization=True)
    except (AttributeError, TypeError, ValueError) as error:
        kind = type(pipeline).__name__
        raise ConfigError(f"model.pretrained: the {kind} cannot be saved: {first_line(error)}") from error


def storable_prompts(key: str, items: Iterable[object]) -> list[Prompt]:
    """Prompts from texts or `Prompt` objects, which a file can hold.

    Raises:
        ConfigError: an item is neither, or its metadata is not what JSON can hold. ``key`` is what messages name.
    """
    prompts = as_prompts(key, items)
    if not prompts:
        raise ConfigError(f"{key}: there is no prompt in it")
    for index, prompt in enumerate(prompts):
        strange = [name for name in prompt.metadata if not isinstance(name, str) or name.lower() == "prompt"]
        if strange:
            raise ConfigError(
                f"{key}: the metadata of item {index} has the key {strange[0]!r}; allowed: other texts"
            )
        try:
            json.dumps(dict(prompt.metadata))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}: the metadata of item {index} cannot be written: {error}") from None
    return prompts


def _as_lines(prompts: Sequence[Prompt]) -> str:
    """A file of prompts with an object a line."""
    return "".join(json.dumps({**prompt.metadata, "prompt": prompt.text}) + "\n" for prompt in prompts)
