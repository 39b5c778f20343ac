"""Changes the metrics of a benchmark's categories, as the command line asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml
from pydantic import ValidationError

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError, first_line
from loopfast.evaluation.benchmark.run import Category

# The rewards inside `three_in_one`, which takes their options under their names.
_PARTS = ("blip_vqa", "spatial", "clip_score")
# Options with the revision of the weights that another option names. They do not apply to other weights.
_REVISIONS = {"weights": "revision", "depth_weights": "depth_revision"}


def with_metrics(categories: Sequence[Category], metrics: Sequence[str]) -> list[Category]:
    """Returns categories with other metrics.

    Args:
        metrics: ``CATEGORY=NAME`` or ``CATEGORY={name: NAME, options: {KEY: VALUE}}``, where NAME is a reward of the
            package or a ``module:function``.

    Raises:
        ConfigError: a text has another form, or names a category that is not measured.
    """
    changed = {category.name: category for category in categories}
    for text in metrics:
        name, separator, value = text.partition("=")
        if not separator or name not in changed:
            raise ConfigError(
                f"--metric {text!r}: allowed: CATEGORY=NAME or CATEGORY={{name: NAME, options: {{...}}}} with a "
                f"category of {', '.join(changed)}"
            )
        found = _yaml("--metric", text, value)
        try:
            metric = RewardConfig.model_validate({"name": found} if isinstance(found, str) else found)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or name
            raise ConfigError(f"--metric {text!r}: {key}: {first['msg']}") from None
        changed[name] = replace(changed[name], metric=metric)
    return list(changed.values())


def with_options(categories: Sequence[Category], options: Sequence[str]) -> list[Category]:
    """Returns categories whose metrics have other options.

    Args:
        options: ``NAME.KEY=VALUE`` sets the option of every metric of that name, also inside `three_in_one`. Other
            weights are used without the revision of the default ones.

    Raises:
        ConfigError: a text has another form, or no category is measured by that metric.
    """
    changed = list(categories)
    for text in options:
        left, separator, value = text.partition("=")
        name, _, key = left.rpartition(".")
        if not separator or not name or not key:
            raise ConfigError(
                f"--metric-option {text!r}: allowed: NAME.KEY=VALUE, such as blip_vqa.weights=FOLDER"
            )
        found = _yaml("--metric-option", text, value)
        if not any(_takes(category.metric, name) for category in changed):
            measured = ", ".join(dict.fromkeys(category.metric.name for category in changed))
            raise ConfigError(
                f"--metric-option {text!r}: no category is measured by {name!r}; allowed: options of {measured}"
            )
        changed = [replace(c, metric=_with_option(c.metric, name, key, found)) for c in changed]
    return changed


def _takes(metric: RewardConfig, name: str) -> bool:
    return metric.name == name or (metric.name == "three_in_one" and name in _PARTS)


def _with_option(metric: RewardConfig, name: str, key: str, value: Any) -> RewardConfig:
    if not _takes(metric, name):
        return metric
    before = metric.options if metric.name == name else metric.options.get(name) or {}
    after = {option: kept for option, kept in before.items() if option != _REVISIONS.get(key)} | {key: value}
    options = after if metric.name == name else {**metric.options, name: after}
    return metric.model_copy(update={"options": options})


def _yaml(flag: str, text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = first_line(error)
        raise ConfigError(f"{flag} {text!r}: not YAML: {reason}") from None
