"""Plans a run: memory by ZeRO stage, what fits, and the seconds of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from loopfast.config import Config
from loopfast.engines import require_type
from loopfast.planning.architectures import Architecture, load_architecture
from loopfast.planning.devices import Device, choose
from loopfast.planning.memory import Case, Footprint, Resources, footprint
from loopfast.planning.networks import Weights
from loopfast.planning.savings import Advice, advise, largest_sizes
from loopfast.planning.speed import Scale, Work, scaling, work_of


@dataclass(frozen=True)
class Stage:
    """A ZeRO stage: its memory, and the largest sizes that fit."""

    footprint: Footprint
    fits: bool
    largest_samples: int | None
    largest_microbatch: int | None


@dataclass(frozen=True)
class Plan:
    """The memory and the speed of a run, before it runs.

    Attributes:
        config: the run.
        architecture, weights: its model.
        device, resources: the devices that it is planned for.
        stages: one for each ZeRO stage.
        advice: the savings that make it fit, at the stage of the configuration.
        work: the operations of one process in an iteration.
        seconds: the seconds of these, by part.
        weak, strong: the same with other numbers of GPUs; the images grow with them, or stay.
    """

    config: Config
    architecture: Architecture
    weights: Weights
    device: Device
    resources: Resources
    stages: tuple[Stage, ...]
    advice: Advice
    work: Work
    seconds: dict[str, float]
    weak: list[Scale]
    strong: list[Scale]

    @property
    def chosen(self) -> Stage:
        """The configuration's ZeRO stage."""
        return self.stages[self.config.distributed.zero_stage]


def plan(
    config: Config,
    *,
    gpus: int | None = None,
    memory: str | None = None,
    card: str | None = None,
    model: str | None = None,
) -> Plan:
    """Plans a run from its configuration and that of its model. Nothing is loaded.

    Args:
        config: the run.
        gpus: the number of processes, each with a device. None means 1.
        memory: the memory of each device, such as ``24GiB``. None takes the device's.
        card: one of `loopfast.planning.devices.DEVICES`, or ``cpu``. None chooses, see
            `loopfast.planning.devices.choose`.
        model: an architecture of the package, in place of ``model.pretrained``.

    Raises:
        ConfigError: a value is not allowed, DeepSpeed refuses the configuration on this machine's CPU, or the model's
            configuration cannot be read.
    """
    device, resources = choose(config.model.device, card, memory, gpus)
    require_type(config.model.dtype, config.distributed.zero_stage, resources.device)
    architecture = load_architecture(config.model, model)
    cases = [Case(config, architecture, resources, stage) for stage in range(4)]
    stages = tuple(_stage(case) for case in cases)
    case = cases[config.distributed.zero_stage]
    batch = stages[case.stage].footprint.batch
    work = work_of(case, batch)
    return Plan(
        config,
        architecture,
        case.weights,
        device,
        resources,
        stages,
        advise(config, architecture, resources),
        work,
        work.seconds(device, config),
        scaling(case, batch, device, weak=True),
        scaling(case, batch, device, weak=False),
    )


def _stage(case: Case) -> Stage:
    found = footprint(case.config, case.architecture, case.resources, case.stage)
    return Stage(found, found.total <= case.resources.usable, *largest_sizes(case, found.batch))
