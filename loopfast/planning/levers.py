"""What makes a run fit: the largest sizes that do, and the cheapest set of changes that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loopfast.algorithms import ALGORITHMS
from loopfast.config import Config, config_to_yaml, parse_config
from loopfast.errors import ConfigError
from loopfast.planning.architectures import Architecture
from loopfast.planning.memory import Footprint, Resources, footprint, with_sizes

MOST_SAMPLES = 4096
"""K up to which the largest one that fits is looked for."""


@dataclass(frozen=True)
class Lever:
    """A change of the configuration that saves memory.

    Attributes:
        name: what it is.
        settings: values by key.
        cost: what it costs, in words.
    """

    name: str
    settings: Mapping[str, str]
    cost: str


@dataclass(frozen=True)
class Applied:
    """A lever of a set, with the bytes on the device when it and those before it are pulled."""

    lever: Lever
    total: int


@dataclass(frozen=True)
class Advice:
    """A set of levers in the order of their cost.

    Attributes:
        levers: the set; empty where the run fits as it is.
        fits: whether the run fits with all of them.
    """

    levers: tuple[Applied, ...]
    fits: bool

    @property
    def overrides(self) -> list[str]:
        """The set as ``section.key=value``; of two values for a key, the later."""
        return [f"{key}={value}" for key, value in _merged([a.lever for a in self.levers]).items()]


def fits(config: Config, architecture: Architecture, resources: Resources, stage: int | None = None) -> bool:
    """Whether each process's memory suffices."""
    return footprint(config, architecture, resources, stage).total <= resources.usable


def largest_samples(
    config: Config, architecture: Architecture, resources: Resources, plan: Footprint
) -> int | None:
    """The largest K that fits with the rest as planned, up to `MOST_SAMPLES`; None where none does."""
    least = 2 if ALGORITHMS[config.algorithm.name].needs_group else 1
    sizes = (plan.batch.rollout, plan.batch.replay)

    def possible(samples: int) -> bool:
        changed = with_sizes(config, microbatch=sizes, samples=samples)
        return fits(changed, architecture, resources, plan.stage)

    return _largest(possible, least, MOST_SAMPLES)


def largest_microbatch(
    config: Config, architecture: Architecture, resources: Resources, plan: Footprint
) -> int | None:
    """The most rows per call, in rollout and replay alike, that fit with the rest as planned; None where none does.

    No more than a process has images.
    """

    def possible(rows: int) -> bool:
        return fits(with_sizes(config, microbatch=(rows, rows)), architecture, resources, plan.stage)

    return _largest(possible, 1, plan.batch.images)


def _largest(possible: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number in ``low..high`` that is possible, if all smaller ones are as well."""
    if low > high or not possible(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if possible(middle) else (low, middle - 1)
    return low


def changed(config: Config, settings: Mapping[str, str]) -> Config | None:
    """The configuration with other values; None where they contradict it."""
    try:
        return parse_config(config_to_yaml(config), [f"{key}={value}" for key, value in settings.items()])
    except ConfigError:
        return None


def advise(config: Config, architecture: Architecture, resources: Resources) -> Advice:
    """The cheapest set of levers with which a run fits.

    Levers are pulled one after the other, in the order of what they cost, until it does; then those that turn out not
    to be needed are let go again, the most expensive first.
    """
    if fits(config, architecture, resources):
        return Advice((), True)

    def total(levers: list[Lever]) -> int | None:
        there = changed(config, _merged(levers))
        return None if there is None else footprint(there, architecture, resources).total

    pulled: list[Lever] = []
    before = footprint(config, architecture, resources).total
    for lever in _levers(config, resources):
        now = total([*pulled, lever])
        if now is None or now >= before:
            continue
        pulled.append(lever)
        before = now
        if now <= resources.usable:
            break
    enough = before <= resources.usable
    if enough:
        for lever in pulled[-2::-1]:
            fewer = [other for other in pulled if other is not lever]
            now = total(fewer)
            if now is not None and now <= resources.usable:
                pulled = fewer
        pulled = _widened(config, architecture, resources, pulled)
    applied = []
    for index, lever in enumerate(pulled):
        now = total(pulled[: index + 1])
        applied.append(Applied(lever, now if now is not None else before))
    return Advice(tuple(applied), enough)


def _widened(
    config: Config, architecture: Architecture, resources: Resources, pulled: list[Lever]
) -> list[Lever]:
    """The set with as many rows per call as it has room for, where one of its levers lowered them."""
    index = next((i for i, lever in enumerate(pulled) if "train.microbatch" in lever.settings), None)
    if index is None:
        return pulled
    most = footprint(config, architecture, resources).batch

    def at(rows: int) -> Lever:
        return _microbatch(min(rows, most.rollout), min(rows, most.replay))

    def possible(rows: int) -> bool:
        there = changed(config, _merged([*pulled[:index], at(rows), *pulled[index + 1 :]]))
        return there is not None and fits(there, architecture, resources)

    rows = _largest(possible, 1, max(most.rollout, most.replay)) or 1
    return [*pulled[:index], at(rows), *pulled[index + 1 :]]


def _microbatch(rollout: int, replay: int) -> Lever:
    settings = {"rollout.microbatch": str(rollout), "train.microbatch": str(replay)}
    return Lever("fewer rows per model call", settings, "more and smaller calls")


def _levers(config: Config, resources: Resources) -> Iterator[Lever]:
    """All that there are, by what they cost in time; the last changes what is trained."""
    yield _microbatch(1, 1)
    if resources.device == "cuda":
        yield Lever(
            "trajectories on the host", {"trajectories.device": "host"}, "a copy for each call of the replay"
        )
    yield Lever(
        "release the text encoder",
        {"model.free_text_encoder": "true"},
        "none; prompts are encoded at the start",
    )
    yield Lever("decode in tiles", {"model.vae_tiling": "true"}, "a little decoding time, faint seams")
    stage = config.distributed.zero_stage
    if resources.gpus > 1:
        spread = {1: "the optimizer's state", 2: "and gradients", 3: "and weights"}
        for higher in range(stage + 1, 4):
            yield Lever(
                f"ZeRO stage {higher}: shard {spread[higher]}",
                {"distributed.zero_stage": str(higher)},
                "gathers the weights for every call" if higher == 3 else "little",
            )
    if config.model.dtype == "float32":
        yield Lever(
            "16-bit activations", {"model.dtype": "bfloat16"}, "rounding; faster on GPUs, slower on CPUs"
        )
    yield Lever(
        "8-bit moments", {"train.optimizer": "adamw_8bit"}, "rounding of the moments; needs bitsandbytes"
    )
    yield Lever(
        "recompute activations", {"train.gradient_checkpointing": "true"}, "a third more time in the replay"
    )
    if resources.device == "cuda":
        sharded = str(max(stage, 3 if resources.gpus > 1 else 1))
        settings = {"distributed.offload": "optimizer", "distributed.zero_stage": sharded}
        yield Lever(
            "optimizer in the host's memory", settings, "updates at the speed of the host and its bus"
        )
        settings = {"distributed.offload": "all", "distributed.zero_stage": "3"}
        yield Lever("weights in the host's memory", settings, "every call waits for the host's bus")
    yield Lever("a low-rank adapter", {"model.tune": "lora"}, "trains less than all weights")


def _merged(levers: list[Lever]) -> dict[str, str]:
    return {key: value for lever in levers for key, value in lever.settings.items()}
