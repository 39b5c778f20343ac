"""Commands about configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loopfast.cli.app import config_app
from loopfast.cli.options import ConfigArgument, ConfigOption, Overrides, load
from loopfast.system.libraries import quiet_libraries

if TYPE_CHECKING:
    from loopfast.policies import TextLimit
    from loopfast.prompts import PromptList


@config_app.command(
    "show", epilog="**Example:** `loopfast config show tiny --set model.tune=lora > mine.yaml`"
)
def config_show(config: ConfigArgument = None, name: ConfigOption = "", overrides: Overrides = None) -> None:
    """Print a configuration with all defaults."""
    from loopfast.config import config_to_yaml

    print(config_to_yaml(load(name, overrides)), end="")


@config_app.command("check", epilog="**Example:** `loopfast config check mine.yaml`")
def config_check(config: ConfigArgument = None, name: ConfigOption = "", overrides: Overrides = None) -> None:
    """Check a configuration, its prompts, rewards, scheduler and DeepSpeed file without loading a model.

    Prompts that are too long for the model's text encoders are listed, with the place where they are cut.

    Models on the hub are not looked up. Training checks that their weights can be read when it starts, before it
    samples.
    """
    settings = load(name, overrides)
    quiet_libraries()
    from loopfast.engines import require_settings, require_type
    from loopfast.policies import check_model, load_schedule, local_text_limits
    from loopfast.prompts import load_prompts
    from loopfast.rewards import build_rewards

    # without resolving auto: the run may be on another machine, with GPUs
    model, distributed = settings.model, settings.distributed
    require_type(model.dtype, distributed.zero_stage, model.device)
    require_settings(settings.train, distributed, model.dtype, model.device)
    family = check_model(settings.model)
    if family is not None:
        load_schedule(settings.model, settings.rollout)
    sources = dict.fromkeys([settings.prompts.source, settings.evaluation.prompts or settings.prompts.source])
    found = {source: load_prompts(source) for source in sources}
    limits = local_text_limits(settings.model)
    lines = [] if family is None else [f"model {settings.model.pretrained}: {family.title}"]
    lines += [
        line for source, prompts in found.items() for line in _describe_prompts(source, prompts, limits)
    ]
    if limits is None:
        lines.append(
            f"lengths of prompts: not checked; the tokenizers of {settings.model.pretrained!r} are not on this machine"
        )
    rewards = build_rewards(settings.reward, load=False)
    lines += [f"reward {term.name}: weight {term.weight:g}" for term in rewards.terms]
    print(*lines, f"{name}: no problem found", sep="\n")


def _describe_prompts(source: str, prompts: PromptList, limits: Sequence[TextLimit] | None) -> Iterator[str]:
    """Describes a source of prompts, and every prompt that is cut or that the model reads like another one."""
    from loopfast.policies import read_prompts

    yield f"prompts {source}: {prompts.summary()}, the first {prompts[0].text!r}"
    reading = read_prompts(limits or (), [prompt.text for prompt in prompts])
    if reading.warning is None:
        return
    yield f"  of which {reading.warning}"
    cuts: dict[int, list[str]] = {}
    for cut in reading.cuts:
        cuts.setdefault(cut.index, []).append(str(cut))
    for index in sorted({*cuts, *reading.twins}):
        notes = cuts.get(index, [])
        if index in reading.twins:
            notes.append(f"the same to the model as {prompts.place(reading.twins[index])}")
        yield f"  {prompts.place(index)}: {'; '.join(notes)}"


@config_app.command(
    "deepspeed", epilog="**Example:** `loopfast config deepspeed tiny --set distributed.zero_stage=3`"
)
def config_deepspeed(
    config: ConfigArgument = None, name: ConfigOption = "", overrides: Overrides = None
) -> None:
    """Print the JSON settings of DeepSpeed for a run."""
    settings = load(name, overrides)
    quiet_libraries()
    from loopfast.engines import deepspeed_settings, require_settings
    from loopfast.planning.architectures import load_architecture
    from loopfast.system.device import torch_device

    model, sections = settings.model, (settings.train, settings.distributed)
    require_settings(*sections, model.dtype, model.device)
    parameters = load_architecture(model).denoiser.parameters()
    pinned = torch_device(model.device).type == "cuda"
    print(json.dumps(deepspeed_settings(*sections, model.dtype, parameters, pinned=pinned), indent=2))


@config_app.command("schema", epilog="**Example:** `loopfast config schema > loopfast.schema.json`")
def config_schema() -> None:
    """Print the JSON Schema of configurations for editors: every key with its default and meaning."""
    from loopfast.config import json_schema

    print(json.dumps(json_schema(), indent=2))
