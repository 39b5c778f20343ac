"""The configuration of an exported LoRA, from its card or from its run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from loopfast.config import Config, LoraConfig, ModelConfig, RolloutConfig, load_config, parse_config
from loopfast.errors import ConfigError
from loopfast.policies import adopted_lora, load_family

CARD = "README.md"
BASE, BASE_CONFIG = "loopfast_base", "loopfast_config"
"""Keys of a card's header for ``model.pretrained`` and ``model.config`` that are not hub names. A path is relative to
the card's folder."""


def plain_config(target: str) -> Config:
    """The configuration of a model without a run: it samples without noise, as its pipeline does by default."""
    model = ModelConfig(pretrained=target, tune="lora")
    rollout = RolloutConfig(steps=50, guidance_scale=7.5)
    # a configuration file cannot ask for deterministic sampling, which is not for training
    noise = "noise_level" if load_family(model).process == "flow" else "eta"
    return Config(model=model).model_copy(update={"rollout": rollout.model_copy(update={noise: 0.0})})


def lora_config(lora: Path, pretrained: str | None, *, recipe: bool = False) -> Config:
    """The configuration of the run that trained a LoRA, changed to start from the LoRA.

    Args:
        lora: the LoRA's folder or file.
        pretrained: the base model; None stands for the one that the LoRA's card or its run names.
        recipe: the rewards are needed, too.

    Raises:
        ConfigError: the base model, or the rewards, are not known.
    """
    trained = _of_run(lora) or _of_card(lora)
    if trained is None and recipe:
        raise ConfigError(
            f"{str(lora)!r} is a LoRA whose card has no recipe of loopfast, so there is no reward to measure; "
            "`loopfast benchmark` has its own"
        )
    config = trained or plain_config(pretrained or _base(lora))
    start = LoraConfig.model_validate({"from": str(lora)})
    changes: dict[str, Any] = {"tune": "lora", "lora": start}
    if pretrained is not None:
        changes |= {"pretrained": pretrained, "config": None}
    model = config.model.model_copy(update=changes)
    return config.model_copy(update={"model": adopted_lora(model)})


def _of_run(lora: Path) -> Config | None:
    """The configuration that a run keeps beside the LoRA that it writes."""
    file = lora.resolve().parent / "config.yaml"
    return load_config(file) if lora.resolve().name == "lora" and file.is_file() else None


def _of_card(lora: Path) -> Config | None:
    """The recipe in a card that loopfast wrote, with the base model that its header names."""
    header, body = _card(lora)
    recipe = re.search(r"\n## Recipe\n.*?```yaml\n(.*?)```", body, re.DOTALL)
    if recipe is None or not ({"base_model", BASE} & header.keys()):
        return None
    found = parse_config(recipe.group(1), name=f"the recipe in {lora / CARD}")
    place = {"pretrained": _base(lora), "config": _place(lora, header.get(BASE_CONFIG)), "device": "auto"}
    return found.model_copy(update={"model": found.model.model_copy(update=place)})


def _base(lora: Path) -> str:
    header, _ = _card(lora)
    named: Any = _place(lora, header.get(BASE)) or header.get("base_model") or _base_of_peft(lora)
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(named, str) or not named:
        raise ConfigError(
            f"{str(lora)!r} is a LoRA that does not say what model it was trained on (base_model in the header of its "
            f"{CARD}); --pretrained names it"
        )
    return named


def _place(lora: Path, name: object) -> str | None:
    """A path from a card's header, resolved from the card's folder; ``embedded`` stays as it is."""
    if not isinstance(name, str) or name == "embedded":
        return name if isinstance(name, str) else None
    place = lora / name
    if not place.exists():
        raise ConfigError(
            f"{str(lora)!r} is a LoRA whose card says that its base model is at {str(place)!r}, and nothing is there; "
            "--pretrained names another place"
        )
    return str(place.resolve())


def _base_of_peft(lora: Path) -> object:
    try:
        return json.loads((lora / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None


def _card(lora: Path) -> tuple[dict[str, Any], str]:
    """The header and the body of a card; both are empty if the card is missing or cannot be read."""
    try:
        text = (lora / CARD).read_text("utf-8")
        _, header, body = text.split("---\n", 2)
        found = yaml.safe_load(header)
    except (OSError, ValueError, yaml.YAMLError):
        return {}, ""
    return (found if isinstance(found, dict) else {}), body
