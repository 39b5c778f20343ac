"""The changes of a configuration that make a run fit, and the largest sizes that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loopfast.algorithms import ALGORITHMS
from loopfast.config import Config, config_to_yaml, parse_config
from loopfast.errors import ConfigError
from loopfast.planning.architectures import Architecture
from loopfast.planning.memory import Batch, Case, Resources, footprint, with_sizes

MOST_SAMPLES = 4096
"""The largest K that is tried."""


@dataclass(frozen=True)
class Saving:
    """A change of the configuration that saves memory: the new values by key, and their cost in words."""

    name: str
    settings: Mapping[str, str]
    cost: str


@dataclass(frozen=True)
class Applied:
    """A saving of a set, with the bytes on the device when it and those before it are applied."""

    saving: Saving
    total: int


@dataclass(frozen=True)
class Advice:
    """Savings in the order of their cost, none if the run fits as it is, and whether it fits with all of them."""

    savings: tuple[Applied, ...]
    fits: bool

    @property
    def overrides(self) -> list[str]:
        """The set as ``section.key=value``. A later value of a key replaces an earlier one."""
        return [f"{key}={value}" for key, value in _merged([a.saving for a in self.savings]).items()]


def fits(config: Config, architecture: Architecture, resources: Resources, stage: int | None = None) -> bool:
    """Returns whether each process's memory suffices."""
    return footprint(config, architecture, resources, stage).total <= resources.usable


def largest_sizes(case: Case, batch: Batch) -> tuple[int | None, int | None]:
    """Returns the largest K that fits with the same rows per call, and the largest number of rows per call that fits.

    K is at most `MOST_SAMPLES`. The rows are those of rollout and replay alike, and at most a process's images. A size
    is None if none fits.
    """

    def possible(rows: tuple[int, int], samples: int | None = None) -> bool:
        changed = with_sizes(case.config, microbatch=rows, samples=samples)
        return fits(changed, case.architecture, case.resources, case.stage)

    least = 2 if ALGORITHMS[case.config.algorithm.name].needs_group else 1
    return (
        _largest(lambda samples: possible((batch.rollout, batch.replay), samples), least, MOST_SAMPLES),
        _largest(lambda rows: possible((rows, rows)), 1, batch.images),
    )


def _largest(possible: Callable[[int], bool], low: int, high: int) -> int | None:
    """Returns the largest possible number in ``low..high``, or None. If a number is possible, so are all smaller."""
    if low > high or not possible(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if possible(middle) else (low, middle - 1)
    return low


def changed(config: Config, settings: Mapping[str, str]) -> Config | None:
    """Returns the configuration with other values, or None if they contradict the rest."""
    try:
        return parse_config(config_to_yaml(config), [f"{key}={value}" for key, value in settings.items()])
    except ConfigError:
        return None


def advise(config: Config, architecture: Architecture, resources: Resources) -> Advice:
    """Returns the cheapest set of savings with which a run fits.

    Savings are added in the order of their cost until the run fits. Then those that turn out not to be needed are
    removed, the most expensive first.
    """

    def total(savings: list[Saving]) -> float:
        there = changed(config, _merged(savings))
        return math.inf if there is None else footprint(there, architecture, resources).total

    start = footprint(config, architecture, resources)
    least, chosen = start.total, list[Saving]()
    for saving in _savings(config, resources):
        if least <= resources.usable:
            break
        found = total([*chosen, saving])
        if found < least:
            chosen.append(saving)
            least = int(found)
    suffices = least <= resources.usable
    if suffices:
        for saving in chosen[-2::-1]:
            fewer = [other for other in chosen if other is not saving]
            if total(fewer) <= resources.usable:
                chosen = fewer
        # the saving that lowers the rows per call is the first, and lowers them no further than needed
        if chosen and "train.microbatch" in chosen[0].settings:
            before, others = start.batch, chosen[1:]

            def at(rows: int) -> list[Saving]:
                return [_microbatch(min(rows, before.rollout), min(rows, before.replay)), *others]

            most = max(before.rollout, before.replay)
            chosen = at(_largest(lambda rows: total(at(rows)) <= resources.usable, 1, most) or 1)
    totals = (total(chosen[: index + 1]) for index in range(len(chosen)))
    applied = (
        Applied(saving, least if found == math.inf else int(found))
        for saving, found in zip(chosen, totals, strict=True)
    )
    return Advice(tuple(applied), suffices)


def _microbatch(rollout: int, replay: int) -> Saving:
    settings = {"rollout.microbatch": str(rollout), "train.microbatch": str(replay)}
    return Saving("fewer rows per model call", settings, "more and smaller calls")


def _savings(config: Config, resources: Resources) -> Iterator[Saving]:
    """Yields all savings in the order of their cost in time. The last one changes what is trained."""
    yield _microbatch(1, 1)
    if resources.device == "cuda":
        yield Saving(
            "trajectories on the host", {"trajectories.device": "host"}, "a copy for each call of the replay"
        )
    yield Saving(
        "release the text encoder",
        {"model.free_text_encoder": "true"},
        "none; prompts are encoded at the start",
    )
    yield Saving("decode in tiles", {"model.vae_tiling": "true"}, "a little decoding time, faint seams")
    stage = config.distributed.zero_stage
    if resources.gpus > 1:
        spread = {1: "the optimizer's state", 2: "and gradients", 3: "and weights"}
        for higher in range(stage + 1, 4):
            yield Saving(
                f"ZeRO stage {higher}: shard {spread[higher]}",
                {"distributed.zero_stage": str(higher)},
                "gathers the weights for every call" if higher == 3 else "little",
            )
    if config.model.dtype == "float32":
        yield Saving(
            "16-bit activations", {"model.dtype": "bfloat16"}, "rounding; faster on GPUs, slower on CPUs"
        )
    yield Saving(
        "8-bit moments", {"train.optimizer": "adamw_8bit"}, "rounding of the moments; needs bitsandbytes"
    )
    yield Saving(
        "recompute activations", {"train.gradient_checkpointing": "true"}, "a third more time in the replay"
    )
    if resources.device == "cuda":
        sharded = str(max(stage, 3 if resources.gpus > 1 else 1))
        settings = {"distributed.offload": "optimizer", "distributed.zero_stage": sharded}
        yield Saving(
            "optimizer in the host's memory", settings, "updates at the speed of the host and its bus"
        )
        settings = {"distributed.offload": "all", "distributed.zero_stage": "3"}
        yield Saving("weights in the host's memory", settings, "every call waits for the host's bus")
    yield Saving("a low-rank adapter", {"model.tune": "lora"}, "trains less than all weights")


def _merged(savings: list[Saving]) -> dict[str, str]:
    return {key: value for saving in savings for key, value in saving.settings.items()}
