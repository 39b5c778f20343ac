"""Checkpoints that survive a kill, a full disk and a damaged file.

A checkpoint is a folder of safetensors and JSON files; reading it executes nothing in it. It is written under a
temporary name beside its final place, synced to the disk and renamed. A folder with a final name is therefore complete
unless something damaged it later. Its manifest holds the size and SHA-256 of every file. Reading checks them, so that
damage is found before training continues:

    checkpoints/
      iteration-000020/             20 iterations are complete
        manifest.json               sizes, hashes, the score used by keep-best, the version that wrote it
        state.json                  everything that is not a tensor
        policy.safetensors          named tensors
        optimizer.safetensors
      iteration-000020-update-2/    20 iterations and two updates of the 21st (written on an interruption)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loopfast.errors import CheckpointError
from loopfast.system.files import reason
from loopfast.version import __version__

__all__ = ["Checkpoint", "CheckpointStore"]

_FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TEMPORARY = ".tmp-"
_REPLACED = ".old-"
_NAME = re.compile(r"iteration-(\d{6,})(?:-update-(\d+))?")
_TENSOR_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, loaded to the CPU.

    Attributes:
        path: its folder.
        iteration: the number of complete iterations.
        update: the number of updates done in the next iteration; 0 between iterations.
        tensors: the named tensors of each file, as `CheckpointStore.save` received them.
        state: the JSON state, as `CheckpointStore.save` received it.
    """

    path: Path
    iteration: int
    update: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: the folder that holds them. The first `save` creates it.
        keep: how many of the newest to keep, at least 1.
        keep_best: keep the one with the highest score too, whatever its age.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, directory: Path, keep: int, keep_best: bool) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep
        self.keep_best = keep_best

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, oldest first. Their contents are not read."""
        if not self.directory.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        positions = {path: (int(match[1]), int(match[2] or 0)) for match, path in found if match}
        return sorted(positions, key=positions.__getitem__)

    def save(
        self,
        iteration: int,
        update: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        state: Mapping[str, Any],
        score: float | None,
    ) -> Path:
        """Writes a checkpoint, then removes those that need not be kept.

        Nothing is removed before the new checkpoint is in its place. Checkpoints of a later point of the run are
        removed too: the run was resumed from an earlier point, and they are no longer its history.

        Args:
            iteration, update: see `Checkpoint`.
            tensors: file names without their ending, each with its named tensors of any dtype and device.
            state: the rest of the run's state; anything JSON can hold.
            score: the score that `best` compares; higher is better. None if this point was not evaluated: the
                checkpoint then keeps the score of the one that it replaces, if any.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the disk is full or cannot be written. Earlier checkpoints are intact.
            ValueError: a file name is not made of letters, digits, ``-`` and ``_``.
        """
        for file in tensors:
            if not _TENSOR_FILE.fullmatch(file):
                raise ValueError(f"tensors: a group's name is letters, digits, '-' and '_', got {file!r}")
        name = f"iteration-{iteration:06d}" + (f"-update-{update}" if update else "")
        temporary = self.directory / f"{_TEMPORARY}{name}"
        if score is None or not math.isfinite(score):
            score = self._score(self.directory / name)
        try:
            self.recover()
            temporary.mkdir(parents=True)
            for file, named in tensors.items():
                save_file(_storable(named), temporary / f"{file}.safetensors")
            (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            manifest = {
                "format": _FORMAT,
                "loopfast": __version__,
                "iteration": iteration,
                "update": update,
                "score": score,
                "files": {
                    path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                    for path in sorted(temporary.iterdir())
                },
            }
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in temporary.iterdir():
                _sync(path)
            _sync(temporary)
            final = self._put_in_place(temporary, name)
        except (OSError, SafetensorError) as error:
            paths = self.paths()
            intact = (
                f"the last one saved, {paths[-1].name}, is intact" if paths else "there is none from before"
            )
            raise CheckpointError(
                f"cannot save checkpoint {name} in {self.directory}: {reason(error)}; {intact}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(final)
        return final

    def load(self, path: Path) -> Checkpoint:
        """Reads a checkpoint, also of another store, to the CPU, and checks every file against its manifest.

        Raises:
            CheckpointError: a file is missing, truncated or altered; the message names it.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, expected in manifest["files"].items():
            _verify(path, name, expected)
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            tensors = {
                name.removesuffix(".safetensors"): load_file(path / name)
                for name in manifest["files"]
                if name.endswith(".safetensors")
            }
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {reason(error)}") from error
        return Checkpoint(path, manifest["iteration"], manifest["update"], tensors, state)

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Loads the newest checkpoint that is undamaged, or returns None if there is none.

        It calls ``warn`` with one line for each damaged checkpoint that is skipped: its path and its fault.
        """
        for path in reversed(self.paths()):
            try:
                return self.load(path)
            except CheckpointError as error:
                warn(f"{error}; using the one before it")
        return None

    def best(self) -> Path | None:
        """The folder of the checkpoint with the highest score, or None if none has a score.

        The newest of equal scores wins. Only manifests are read; `load` checks the rest.
        """
        scores = {path: score for path in reversed(self.paths()) if (score := self._score(path)) is not None}
        return max(scores, key=scores.__getitem__, default=None)

    def _score(self, path: Path) -> float | None:
        try:
            return _read_manifest(path)["score"]
        except CheckpointError:
            return None

    def _put_in_place(self, temporary: Path, name: str) -> Path:
        final = self.directory / name
        replaced = self.directory / f"{_REPLACED}{name}"
        if final.exists():
            # A folder cannot be renamed over another. If the process is killed in between, `recover` puts it back.
            final.rename(replaced)
        temporary.rename(final)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def recover(self) -> None:
        """Removes what a process that was killed while saving left behind.

        Only the process that writes the checkpoints may call it: any other would remove the one being written.

        Raises:
            OSError: the folder cannot be read or written.
        """
        if not self.directory.is_dir():
            return
        for path in list(self.directory.iterdir()):
            if path.name.startswith(_TEMPORARY):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(_REPLACED):
                final = self.directory / path.name.removeprefix(_REPLACED)
                if final.exists():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.rename(final)

    def _prune(self, newest: Path) -> None:
        paths = self.paths()
        end = paths.index(newest) + 1
        for path in paths[end:]:
            self._remove(path)
        best = self.best() if self.keep_best else None
        for path in paths[: max(0, end - self.keep)]:
            if path != best:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        doomed = self.directory / f"{_TEMPORARY}{path.name}"
        try:
            # Renamed first: a process that is killed here leaves no half-empty folder with a final name.
            path.rename(doomed)
        except OSError:
            return
        shutil.rmtree(doomed, ignore_errors=True)


def _storable(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors in the form that safetensors accepts: on the CPU, contiguous, none sharing memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in named.items():
        local = tensor.detach().cpu().contiguous()
        storage = local.untyped_storage().data_ptr()
        result[name] = local.clone() if storage in seen else local
        seen.add(storage)
    return result


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is incomplete: {_MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: {_MANIFEST} cannot be read ({reason(error)})") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"checkpoint {path} is damaged: {_MANIFEST} is not a manifest")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {manifest['format']} and was written by loopfast "
            f"{manifest.get('loopfast')}; this is loopfast {__version__}, which reads format {_FORMAT}"
        )
    files = manifest.get("files")
    well_formed = (
        isinstance(files, dict)
        and _STATE in files
        and all(Path(name).name == name and isinstance(entry, dict) for name, entry in files.items())
        and all(isinstance(manifest.get(key), int) for key in ("iteration", "update"))
        and isinstance(manifest.get("score"), (int, float, type(None)))
    )
    if not well_formed:
        raise CheckpointError(f"checkpoint {path} is damaged: {_MANIFEST} lacks entries")
    return manifest


def _verify(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    file = path / name
    try:
        size = file.stat().st_size
        if size != expected.get("bytes"):
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {size} bytes instead of {expected.get('bytes')}"
            )
        if _sha256(file) != expected.get("sha256"):
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} is not what was written (SHA-256 differs)"
            )
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is incomplete: {name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {name} cannot be read: {reason(error)}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
