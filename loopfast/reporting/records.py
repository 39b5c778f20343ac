"""Reads what a run has written, for its reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from loopfast.errors import LoopfastError, one_line
from loopfast.reporting.images import tiles
from loopfast.run.tracking import read_metrics


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of a run: the content of its JSON file, and the path of its sprite sheet.

    ``means`` and each category have the mean ``reward`` and those of the ``parts``.
    """

    iteration: int
    means: dict[str, Any]
    by_category: dict[str, dict[str, Any]]
    items: list[dict[str, Any]]
    preview: dict[str, Any]
    sheet: Path

    @classmethod
    def read(cls, path: Path) -> EvaluationRecord:
        """Reads ``evaluation/iteration-N.json``.

        Raises:
            OSError, ValueError, KeyError: the file is damaged.
        """
        data = _mapping(json.loads(path.read_text(encoding="utf-8")))
        return cls(
            data["iteration"],
            {"reward": data["reward"], "parts": data.get("parts", {})},
            data.get("by_category", {}),
            data.get("items", []),
            data.get("preview", {}),
            path.with_suffix(".png"),
        )

    @cached_property
    def tiles(self) -> dict[int, Image.Image]:
        """The preview's tiles by the index of their item; empty if there is no preview or it cannot be read."""
        if not self.preview:
            return {}
        indexes = self.preview["items"]
        try:
            with Image.open(self.sheet) as sheet:
                cut = tiles(sheet, tuple(self.preview["tile"]), self.preview["columns"], len(indexes))
        except OSError:  # missing, or being written at this moment
            return {}
        return {index: tile for index, tile in zip(indexes, cut, strict=False) if index < len(self.items)}


@dataclass(frozen=True)
class RunRecord:
    """The files of a run that reports are made from; those that are not written yet are empty.

    ``last`` has the last line of the metrics: the complete iterations, the images sampled and the seconds until then.
    """

    directory: Path
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    evaluations: list[EvaluationRecord]
    summary: dict[str, Any]
    last: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """Reads a run's folder.

        Raises:
            LoopfastError: the folder is not a run's, or a file in it is damaged.
        """
        file, metrics_file = directory / "config.yaml", directory / "metrics.jsonl"
        if not file.exists() and not metrics_file.exists():
            raise LoopfastError(
                f"{directory} is not the folder of a run: no config.yaml and no metrics.jsonl in it"
            )
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        try:
            config = _mapping(yaml.safe_load(text) or {})
            file = directory / "summary.json"
            summary = _mapping(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
            evaluations = []
            for file in sorted((directory / "evaluation").glob("iteration-*.json")):
                evaluations.append(EvaluationRecord.read(file))
        except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
            raise LoopfastError(f"{file} is damaged: {one_line(error)}") from error
        metrics = read_metrics(metrics_file)
        last = {"iteration": 0, "images": 0, "seconds": 0.0, **(metrics[-1] if metrics else {})}
        return cls(directory, config, text, metrics, evaluations, summary, last)

    def setting(self, section: str, key: str) -> Any:
        """The value of a key of the configuration, or None."""
        return (self.config.get(section) or {}).get(key)

    def column(self, metric: str) -> tuple[list[float], list[float]]:
        """The values of a metric where it was measured, and the images sampled until then, which come first."""
        rows = [row for row in self.metrics if row.get(metric) is not None]
        images = [float(row.get("images", row["iteration"])) for row in rows]
        return images, [float(row[metric]) for row in rows]

    @property
    def name(self) -> str:
        """The run's name, or its folder's."""
        return str(self.setting("run", "name") or self.directory.name)

    @property
    def algorithm(self) -> str:
        """The algorithm's name in capitals."""
        return str(self.setting("algorithm", "name") or "").upper()


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value
