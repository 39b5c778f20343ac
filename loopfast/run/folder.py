"""A run's folder, and the check that a run there may be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from loopfast.config import Config, config_to_yaml, load_config
from loopfast.config.messages import differences
from loopfast.errors import CheckpointError, ConfigError, RunExistsError
from loopfast.run.checkpoints import Checkpoint, CheckpointStore
from loopfast.run.console import Display
from loopfast.run.images import save_image
from loopfast.system.files import write_file, writing

# Keys that may change when a run is resumed: they do not affect the results.
_CHANGEABLE = {
    "run.name",
    "run.directory",
    "run.trackers",
    "model.device",
    "rollout.cuda_graph",
    "rollout.device",
    "rollout.on_bad_reward",
    "rollout.replica",
    "rollout.reward_worker",
    "train.iterations",
    "train.on_policy_check",
    "evaluation.every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "distributed.zero_stage",
    "distributed.offload",
    "distributed.timeout",
    "distributed.deepspeed",
}


class RunFolder:
    """The folder ``<run.directory>/<run.name>`` of a configuration."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.directory).expanduser() / config.run.name
        self.checkpoints = CheckpointStore(
            self.path / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_best
        )
        self._config = config

    def open(self, resume: str | None, display: Display) -> Checkpoint | None:
        """Prepares the folder for a new run, or finds the checkpoint to resume from.

        Args:
            resume: ``auto`` for the newest undamaged checkpoint of this folder, if any, or the path of a checkpoint.
                None begins a new run.

        Raises:
            ConfigError: a new run would overwrite another, or the configuration is not that of the run to resume.
            CheckpointError: the checkpoint cannot be used.
            LoopfastError: the folder cannot be written.
        """
        checkpoint = None
        if resume is None:
            self.require_unused()
        elif resume == "auto":
            with writing(self.checkpoints.directory):
                self.checkpoints.recover()
            checkpoint = self.checkpoints.latest(display.warning)
            if checkpoint is None and self.checkpoints.paths():
                raise CheckpointError(f"none of the checkpoints in {self.checkpoints.directory} can be used")
        else:
            checkpoint = self.checkpoints.load(Path(resume).resolve())
        origin = checkpoint.path.resolve().parent.parent if checkpoint else self.path.resolve()
        if checkpoint is not None:
            self._require_same(origin / "config.yaml")
        with writing(self.path):
            if checkpoint is not None and origin != self.path.resolve():
                self.require_unused()
                self._continue_record(origin, checkpoint.iteration)
            write_file(self.path / "config.yaml", config_to_yaml(self._config).encode())
        return checkpoint

    def continues(self, resume: str | None) -> bool:
        """Returns whether the run in this folder is resumed. It makes the checks of `open`, and writes nothing.

        Raises:
            RunExistsError: the folder holds a run, and another run or none is resumed.
            ConfigError: the configuration is not that of the run to resume.
            CheckpointError: the run to resume does not exist.
        """
        own = self.path.resolve()
        origin = own if resume == "auto" else Path(resume).resolve().parent.parent if resume else None
        if origin != own:
            self.require_unused()
        if origin is None or (resume == "auto" and not self.checkpoints.paths()):
            return False
        self._require_same(origin / "config.yaml")
        return origin == own

    def require_unused(self) -> None:
        """Checks that the folder holds no run.

        Raises:
            RunExistsError: it holds one.
        """
        if _holds_run(self.path):
            number = next(n for n in count(2) if not _holds_run(self.path.with_name(f"{self.path.name}-{n}")))
            raise RunExistsError(self.path, f"{self.path.name}-{number}")

    def _continue_record(self, origin: Path, iteration: int) -> None:
        """Copies the record of another run up to the iteration that this run continues from."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (origin / "metrics.jsonl").exists():
            shutil.copy(origin / "metrics.jsonl", self.path)  # the tracker cuts off what came later
        for name in ("evaluation", "images"):
            for file in sorted((origin / name).glob("iteration-*")):
                if int(file.stem.removeprefix("iteration-")) <= iteration:
                    (self.path / name).mkdir(exist_ok=True)
                    shutil.copy(file, self.path / name)

    def _require_same(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file.parent} is not a run's folder: there is no config.yaml in it")
        before, now = _comparable(load_config(file)), _comparable(self._config)
        if changed := differences(before, now, ignored=_CHANGEABLE):
            raise ConfigError(f"cannot resume {file.parent} with another configuration: {', '.join(changed)}")

    def write_summary(self, facts: Sequence[tuple[str, str]]) -> None:
        """Stores the header's lines for the report."""
        with writing(self.path):
            write_file(self.path / "summary.json", json.dumps({"facts": facts}, indent=1).encode())

    def save_failure(
        self,
        iteration: int,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        rank: int | None = None,
        *,
        place: str = "failures",
    ) -> Path:
        """Writes the images that caused a failure, with their prompts, and returns their folder.

        Args:
            images: N float ``[3, H, W]`` in [0, 1]; NaN is drawn black.
            rank: the rank of the process that writes, if every process writes its own.
            place: the folder within the run's. Images at which the run stopped are in ``failures``.

        Raises:
            LoopfastError: the folder cannot be written.
        """
        process = "" if rank is None else f"-rank-{rank}"
        folder = self.path / place / f"iteration-{iteration:06d}{process}"
        names = [f"{index:03d}.png" for index in range(len(prompts))]
        with writing(folder):
            write_file(
                folder / "prompts.json", json.dumps(dict(zip(names, prompts, strict=True)), indent=1).encode()
            )
            for name, image in zip(names, images, strict=True):
                save_image(image, folder / name)
        return folder


def _holds_run(folder: Path) -> bool:
    store = CheckpointStore(folder / "checkpoints", keep=1, keep_best=False)
    return bool(store.paths()) or (folder / "metrics.jsonl").exists()


def _comparable(config: Config) -> dict[str, Any]:
    """Returns the configuration without the options (URL, timeouts) of reward servers, which may change."""
    sections = config.model_dump(mode="json")
    for term in sections["reward"]:
        if term["name"] == "http":
            term["options"] = {}
    return sections
