"""Commands about configurations."""

from __future__ import annotations

import json

from loopfast.cli.app import config_app
from loopfast.cli.options import ConfigArgument, Overrides, load, quiet_libraries


@config_app.command(
    "show", epilog="**Example:** `loopfast config show tiny --set model.tune=lora > mine.yaml`"
)
def config_show(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print a configuration with every default filled in."""
    from loopfast.config import config_to_yaml

    print(config_to_yaml(load(config, overrides)), end="")


@config_app.command("check", epilog="**Example:** `loopfast config check mine.yaml`")
def config_check(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check a configuration, its prompts, its rewards and its model's place without loading any model.

    Names of models on the hub are not looked up; that their weights can be read shows when training starts, before
    anything is sampled.
    """
    settings = load(config, overrides)
    from loopfast.engines import require_type
    from loopfast.policies import check_model
    from loopfast.prompts import load_prompts
    from loopfast.rewards import build_rewards

    # not for auto: another machine than this one may have GPUs
    require_type(settings, settings.model.device)
    family = check_model(settings.model)
    sources = dict.fromkeys([settings.prompts.source, settings.evaluation.prompts or settings.prompts.source])
    lines = [] if family is None else [f"model {settings.model.pretrained}: {family.title}"]
    lines += [f"prompts {source}: {len(load_prompts(source))}" for source in sources]
    rewards = build_rewards(settings.reward, load=False)
    lines += [f"reward {term.name}: weight {term.weight:g}" for term in rewards.terms]
    print(*lines, f"{config}: no problem found", sep="\n")


@config_app.command(
    "deepspeed", epilog="**Example:** `loopfast config deepspeed tiny --set distributed.zero_stage=3`"
)
def config_deepspeed(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print the JSON that DeepSpeed is started with."""
    settings = load(config, overrides)
    quiet_libraries()
    from loopfast.engines import deepspeed_settings
    from loopfast.planning.architectures import load_architecture
    from loopfast.policies import torch_device

    parameters = load_architecture(settings.model).denoiser.parameters()
    pinned = torch_device(settings.model.device).type == "cuda"
    print(json.dumps(deepspeed_settings(settings, parameters, pinned=pinned), indent=2))


@config_app.command("schema", epilog="**Example:** `loopfast config schema > loopfast.schema.json`")
def config_schema() -> None:
    """Print the JSON Schema of configurations, for editors: every key, its default and its meaning."""
    from loopfast.config import json_schema

    print(json.dumps(json_schema(), indent=2))
