"""Plans a run: memory by ZeRO stage, what fits, and how long an iteration takes."""

from __future__ import annotations

from dataclasses import dataclass

from loopfast.config import Config
from loopfast.engines import require_type
from loopfast.planning.architectures import Architecture, load_architecture
from loopfast.planning.cards import Card, choose
from loopfast.planning.levers import Advice, advise, largest_microbatch, largest_samples
from loopfast.planning.memory import Footprint, Resources, footprint
from loopfast.planning.networks import Weights, form_of, weights_of
from loopfast.planning.speed import Scale, Work, scaling, work_of

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Stage:
    """A ZeRO stage: its memory and what else would fit in it."""

    footprint: Footprint
    fits: bool
    largest_samples: int | None
    largest_microbatch: int | None


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it runs.

    Attributes:
        config: the run.
        architecture, weights: its model.
        card, resources: what it is planned for.
        stages: one for each ZeRO stage.
        advice: how to make it fit, at the stage of the configuration.
        work: of one process in an iteration.
        seconds: of that, by part.
        weak, strong: the same with other numbers of GPUs.
    """

    config: Config
    architecture: Architecture
    weights: Weights
    card: Card
    resources: Resources
    stages: tuple[Stage, ...]
    advice: Advice
    work: Work
    seconds: dict[str, float]
    weak: list[Scale]
    strong: list[Scale]

    @property
    def chosen(self) -> Stage:
        """Of the configuration's ZeRO stage."""
        return self.stages[self.config.distributed.zero_stage]


def plan(
    config: Config,
    *,
    gpus: int | None = None,
    memory: str | None = None,
    card: str | None = None,
    model: str | None = None,
) -> Plan:
    """Plans a run from its configuration and that of its model; nothing is loaded.

    Args:
        config: the run.
        gpus: processes with a device each; None: 1.
        memory: of each device, such as ``24GiB``; None: the card's, or the machine's.
        card: one of `loopfast.planning.cards.CARDS`, or ``cpu``; None: see `loopfast.planning.cards.choose`.
        model: an architecture of the package in place of ``model.pretrained``.

    Raises:
        ConfigError: a value is not allowed, DeepSpeed refuses the configuration on this machine's CPU, or the model's
            configuration cannot be read.
    """
    chosen, resources = choose(config, card, memory, gpus)
    require_type(config.model.dtype, config.distributed.zero_stage, resources.device)
    architecture = load_architecture(config.model, model)
    stages = tuple(_stage(config, architecture, resources, stage) for stage in STAGES)
    here = stages[config.distributed.zero_stage].footprint
    work = work_of(config, architecture, resources, here)
    return Plan(
        config,
        architecture,
        weights_of(architecture, form_of(config, resources.device, sharded=here.stage > 0)),
        chosen,
        resources,
        stages,
        advise(config, architecture, resources),
        work,
        work.seconds(chosen, config),
        scaling(config, architecture, chosen, resources, here, weak=True),
        scaling(config, architecture, chosen, resources, here, weak=False),
    )


def _stage(config: Config, architecture: Architecture, resources: Resources, stage: int) -> Stage:
    found = footprint(config, architecture, resources, stage)
    return Stage(
        found,
        found.total <= resources.usable,
        largest_samples(config, architecture, resources, found),
        largest_microbatch(config, architecture, resources, found),
    )
